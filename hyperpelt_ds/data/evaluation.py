"""Finite reading: batches to score on, each sample once over all ranks, and whole splits.

This file must not know the model, nor how an answer is judged; of processes it knows only rank and world size, as
numbers.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence

from hyperpelt_ds.contracts import Batch, Sample
from hyperpelt_ds.data.collate import Collator
from hyperpelt_ds.data.holes import Place, read_batches
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.data.reader import DamagedSample, Reader

log = logging.getLogger(__name__)


def evaluation_batches(
    manifest: Manifest,
    split: str,
    tasks: Sequence[str],
    collator: Collator,
    batch_size: int,
    rank: int,
    world_size: int,
    limit_per_task: int = 0,
) -> Iterator[Batch]:
    """Every sample of `split` once over all ranks, in batches of at most `batch_size`, sorted by length.

    Each rank is given the same number of batches; where samples run out, a batch holds one of weight 0. A limit
    takes the same samples of a task every time, those whose keys have the smallest hashes; 0 takes all. A sample that
    cannot be used has weight 0 and is logged.
    """
    reader = Reader(manifest)
    counts = count(manifest, tasks, split)
    chosen = [(task, i) for task in tasks for i in choose(reader, task, split, counts[task], limit_per_task)]
    chosen.sort(key=lambda sample: reader.length(sample[0], split, sample[1]))
    places = [Place(position, *sample) for position, sample in enumerate(chosen)]
    batches = -(-len(places) // (batch_size * world_size)) * world_size
    for number in range(rank, batches, world_size):
        start, end = (len(places) * edge // batches for edge in (number, number + 1))
        own = places[start:end]
        [batch], holes = read_batches(reader, collator, split, own or places[:1], {})
        for hole in holes if own else ():
            log.warning("not scored: shard %s, key %r: %s", hole.shard, hole.key, hole.reason)
        yield batch if own else batch._replace(loss_weights=batch.loss_weights * 0)


def read_texts(manifest: Manifest, task: str, split: str, skip_damaged: bool = False) -> list[Sample]:
    """All samples of one split of one task, in the order of the shards.

    Raises DamagedSample for one that cannot be read, or with `skip_damaged` logs it and goes on.
    """
    reader = Reader(manifest)
    samples = []
    for index in range(manifest.count(task, split)):
        try:
            samples.append(reader.sample(task, split, index))
        except DamagedSample as error:
            if not skip_damaged:
                raise
            log.warning("left out: %s", error)
    return samples


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
        return hashlib.sha256((salt + reader.place(task, split, index)[1]).encode()).digest()

    return sorted(range(samples), key=hashed)[:limit]
