"""Finite reading: batches to score on, each sample once over all ranks, and whole splits.

This file must not know the model, nor how an answer is judged; of processes it knows only rank and world size, as
numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from hyperpelt_ds.contracts import Batch, Hole, Sample
from hyperpelt_ds.data.choice import choose, count
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
    left_out: list[Hole] = []
    for number in range(rank, batches, world_size):
        start, end = (len(places) * edge // batches for edge in (number, number + 1))
        own = places[start:end]
        [batch], holes = read_batches(reader, collator, split, own or places[:1], {})
        left_out += holes if own else []
        yield batch if own else batch._replace(loss_weights=batch.loss_weights * 0)
    if left_out:
        first = left_out[0]
        text = "%s: %d samples cannot be used and are not scored, the first: shard %s, key %r: %s"
        log.warning(text, split, len(left_out), first.shard, first.key, first.reason)


def read_texts(
    manifest: Manifest, task: str, split: str, damaged: dict[int, DamagedSample] | None = None
) -> list[Sample]:
    """All samples of one split of one task, in the order of the shards.

    Raises DamagedSample for one that cannot be read, or puts it into `damaged` under its number and goes on.
    """
    reader = Reader(manifest)
    samples = []
    for index in range(manifest.count(task, split)):
        try:
            samples.append(reader.sample(task, split, index))
        except DamagedSample as error:
            if damaged is None:
                raise
            damaged[index] = error
    return samples
