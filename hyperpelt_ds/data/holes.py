"""Batches from stored samples, with a hole of weight 0 where one cannot be used.

Nothing is put in a damaged sample's place and nothing else moves, so the other samples of the batch, of the step and of
every other rank are what they would have been. This file must not know the order of a run, nor who keeps count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hyperpelt_ds.contracts import Batch, Hole, Sample
from hyperpelt_ds.data.batching import cut
from hyperpelt_ds.data.collate import Collator, Stack, UnusableSample
from hyperpelt_ds.data.reader import DamagedSample, Reader
from hyperpelt_ds.tasks import TASKS
from hyperpelt_ds.tasks.task import check_target


class Place(NamedTuple):
    """A draw: its position in the run, and the sample that it takes, by its number within the split of its task."""

    position: int
    task: str
    number: int


def read_batches(
    reader: Reader,
    collator: Collator,
    split: str,
    places: Sequence[Place],
    loss_weights: Mapping[str, float],
    parts: int = 1,
    budget: int = 0,
    stack: Stack | None = None,
) -> tuple[list[Batch], list[Hole]]:
    """The samples of `places` as `parts` micro-batches of neighbours in length, and what could not be used of them.

    `budget` is about the tokens that a micro-batch may have, 0 for any number. `stack` makes the images of the batches,
    one batch after the other.
    A sample that is usable weighs what `loss_weights` says of its task, 1 if it is not named.
    """
    holes: list[Hole] = []
    samples: list[Sample] = []
    weights: list[float] = []
    features: dict[str, np.ndarray] = {}

    def leave_out(place: Place, at: int, error: ValueError) -> None:
        shard, key = reader.place(place.task, split, place.number)
        holes.append(Hole(place.position, place.task, split, place.number, shard, key, _reason(error, shard)))
        samples[at:] = [Sample(key, place.task, "", ""), *samples[at + 1 :]]
        weights[at:] = [0.0, *weights[at + 1 :]]

    for place in places:
        try:
            sample = reader.sample(place.task, split, place.number)
            if place.task in TASKS:
                check_target(TASKS[place.task], sample.key, sample.target)
            if collator.grid:
                features |= reader.images([sample])
        except ValueError as error:
            leave_out(place, len(samples), error)
        else:
            samples.append(sample)
            weights.append(loss_weights.get(place.task, 1.0))
    while True:
        try:
            rows = collator.rows(samples, weights)
            break
        except UnusableSample as error:  # only tokenizing could tell
            at = samples.index(error.sample)
            leave_out(places[at], at, error)
    groups = cut([(len(row.source), len(row.target)) for row in rows], parts, budget)
    return [collator.batch([rows[i] for i in group], features, stack) for group in groups], holes


def _reason(error: ValueError, shard: str) -> str:
    """What is wrong, without the names that the hole says anyway."""
    if isinstance(error, UnusableSample) or (isinstance(error, DamagedSample) and error.shard == shard):
        return error.reason
    return str(error)
