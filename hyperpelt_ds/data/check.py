"""A look at the data before the first step, so that what is wrong with all of it is said at once and not hours later.

Training itself leaves out and counts what it cannot use; here only the mistakes of whoever set up the run are errors.
This file must not know the order of a run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

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

    Raises ValueError naming the sample for a target that is too long or none of its task's labels, and naming the task
    if none of its samples can be used, or none of its images has features. Otherwise samples that are damaged are only
    counted in a warning: they will be left out.
    """
    reader = Reader(manifest)

    def sees(samples: Sequence[Sample]) -> bool:
        images = {sample.image for sample in samples if sample.image is not None}
        return manifest.features is not None and any(map(reader.has_image, images))

    for task in tasks:
        for split in (TRAIN, VALIDATION):
            looked_at = _some(manifest, reader, task, split)
            own = looked_at[rank::world_size]
            samples, damaged = _read(reader, task, split, own)
            if damaged:
                log.warning(
                    "%d of the %d samples looked at in %s/%s are damaged and will be left out, the first: %s. "
                    "`python data_prep/verify.py %s` lists all",
                    *(len(damaged), len(own), task, split, damaged[0], manifest.path),
                )
            # Of many ranks each sees few: what all of a rank's own lack is an error only if the others' lack it too.
            if damaged and not samples and not _read(reader, task, split, looked_at)[0]:
                raise ValueError(f"task {task!r}: none of the samples looked at in {split} can be used: {damaged[0]}")
            for start in range(0, len(samples), 1024):
                collator.targets(samples[start : start + 1024])
            for sample in samples:
                check_target(get(task), sample.key, sample.target)
            images = [sample.image for sample in samples if sample.image is not None] if collator.grid else []
            if images and not sees(samples) and not sees(_read(reader, task, split, looked_at)[0]):
                raise ValueError(
                    f"task {task!r}: {manifest.path} holds features of none of its images that were looked at, for "
                    f"example {images[0]!r}; data_prep/features.py makes them"
                )


def _read(reader: Reader, task: str, split: str, indexes: Sequence[int]) -> tuple[list[Sample], list[DamagedSample]]:
    samples, damaged = [], []
    for index in indexes:
        try:
            samples.append(reader.sample(task, split, index))
        except DamagedSample as error:
            damaged.append(error)
    return samples, damaged


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
