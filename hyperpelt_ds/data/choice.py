"""Which samples of a split there are to draw from: all, or a part that is the same every time.

This file must not know the order in which they are drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.data.reader import Reader


def count(manifest: Manifest, tasks: Sequence[str], split: str) -> dict[str, int]:
    """Task -> samples; ValueError for a task that has none in this split."""
    counts = {task: manifest.count(task, split) for task in tasks}
    for task in tasks:
        if not counts[task]:
            raise ValueError(f"task {task!r} has no samples of split {split!r} in {manifest.path}")
    return counts


def choose(reader: Reader, task: str, split: str, samples: int, limit: int, salt: str = "") -> Sequence[int]:
    """The indexes of `limit` samples (0: all), those whose keys have the smallest hashes under `salt`."""
    if not 0 < limit < samples:
        return range(samples)

    def hashed(index: int) -> bytes:
        shard, key = reader.place(task, split, index)
        if not key:  # without its key this process could choose others than the rest
            raise ValueError(
                f"shard {shard}: its index cannot be read, so that no part of {task}/{split} can be chosen"
            )
        return hashlib.sha256((salt + key).encode()).digest()

    return sorted(range(samples), key=hashed)[:limit]
