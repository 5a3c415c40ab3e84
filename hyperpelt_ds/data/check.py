"""A look at the data before the first step, so that what is wrong with all of it is said at once and not hours later.

Training itself leaves out and counts what it cannot use; here only the mistakes of whoever set up the run are errors.
This file must not know the order of a run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from hyperpelt_ds.contracts import TRAIN, VALIDATION, Sample
from hyperpelt_ds.data.collate import Collator
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.data.reader import DamagedSample, Reader
from hyperpelt_ds.tasks import get
from hyperpelt_ds.tasks.task import check_target

SHARDS, SAMPLES = 16, 4096
"""Of each split of each task so many shards are looked into, and about so many samples."""

log = logging.getLogger(__name__)


def check_samples(manifest: Manifest, tasks: Sequence[str], collator: Collator, rank: int, world_size: int) -> None:
    """Looks at this rank's share of a few thousand training and validation samples of each task, among them those of
    the longest targets.

    Raises ValueError naming the sample for a target that is too long or none of its task's labels, and for a task with
    images in data without any. A sample that is damaged is only logged: it will be left out.
    """
    reader = Reader(manifest)
    for task in tasks:
        for split in (TRAIN, VALIDATION):
            own = _some(manifest, reader, task, split)[rank::world_size]
            for start in range(0, len(own), 1024):
                samples = list(_usable(reader, task, split, own[start : start + 1024]))
                collator.targets(samples)
                for sample in samples:
                    check_target(get(task), sample.key, sample.target)
                    if collator.grid and sample.image is not None and manifest.features is None:
                        raise ValueError(
                            f"sample {sample.key!r} of task {task!r} has image {sample.image!r}, but {manifest.path} "
                            f"holds no image features; data_prep/features.py makes them"
                        )


def _usable(reader: Reader, task: str, split: str, indexes: Sequence[int]) -> Iterator[Sample]:
    for index in indexes:
        try:
            yield reader.sample(task, split, index)
        except DamagedSample as error:
            log.warning("damaged, will be left out: %s", error)


def _some(manifest: Manifest, reader: Reader, task: str, split: str) -> list[int]:
    """Indexes spread over the split, and those of the longest targets in the shards that hold the longest."""
    shards = manifest.shards(task, split)
    spread = range(0, len(shards), max(1, -(-len(shards) // SHARDS)))
    longest = sorted(range(len(shards)), key=lambda number: -shards[number].longest_target)[: SHARDS // 4]
    chosen = sorted({*spread, *longest})
    share = max(1, SAMPLES // len(chosen)) if chosen else 0
    first = 0
    starts = []
    for shard in shards:
        starts.append(first)
        first += shard.samples
    found: set[int] = set()
    for number in chosen:
        size, start = shards[number].samples, starts[number]
        found.update(range(start, start + size, max(1, -(-size // share))))
        if number in longest:
            found.add(max(range(start, start + size), key=lambda index: reader.lengths(task, split, index)[1]))
    return sorted(found)
