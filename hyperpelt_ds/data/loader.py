"""The endless training stream of one rank.

Its position is integers that follow what was committed to optimizer steps, never what was prefetched. This file must
not know the model, the engine or the loss; of processes it knows only rank and world size, as numbers.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import TRAIN, Batch, Hole, Sample, StreamState
from hyperpelt_ds.data import batching
from hyperpelt_ds.data.choice import choose, count
from hyperpelt_ds.data.collate import Collator, collator_for
from hyperpelt_ds.data.folder import Unreachable
from hyperpelt_ds.data.handover import Shelf, Spot, in_turn, message_items, pack_samples, unpack_samples
from hyperpelt_ds.data.holes import Place, read_batches
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.data.order import Counts, Order, lane_count, mixture
from hyperpelt_ds.data.reader import DamagedSample, Reader

Packed = tuple[list[tuple[Any, ...]] | ValueError, list[Hole], int, int | None]
"""A rank's part of a step as it passes between processes: micro-batches (or why there are none), what could not be used
of them, how many sources were cut, and the slot of the shelf that it was lent."""

_MEASURED = 16  # samples of a task whose tokens are counted to know about how many a byte makes


@dataclass
class _Step:
    """A step that was planned and is not yet committed: the draws that follow it, and what of it this rank could not
    use, once it was given out."""

    drawn: Counts
    holes: list[Hole] = field(default_factory=list)


class TrainStream:
    """Iterating gives, for each optimizer step, this rank's list of micro-batches, without end.

    The global batch of a step is the next `train.global_batch` samples of the Order, the same for every world size. A
    rank computes those of its lanes, sorted by length. `commit` is to be called after each optimizer step; a new
    iterator starts after the last committed step. `truncated` counts the sources that were cut in the batches given out
    so far on this rank. A batch's loss_weights are the tasks' own (data.loss_weights, or 1), and 0 for holes.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: Config,
        tasks: Sequence[str],
        tokenizer: Any,
        rank: int,
        world_size: int,
        state: StreamState | None = None,
    ) -> None:
        """Raises ValueError for batch sizes, features, tasks or a state that do not fit."""
        data, train = config.data, config.train
        self.manifest, self.config = manifest, config
        self.rank, self.world_size = rank, world_size
        lanes = lane_count(train.global_batch, data.lanes)
        self.accumulation = batching.accumulation(train.global_batch, train.micro_batch, lanes, world_size)
        check_vision(manifest, config)
        self._reader = Reader(manifest)
        counts = count(manifest, data.train_tasks or tasks, TRAIN)
        self._chosen = {
            task: choose(self._reader, task, TRAIN, n, data.shots, str(train.seed)) for task, n in counts.items()
        }
        sizes = {task: [shard.samples for shard in manifest.shards(task, TRAIN)] for task in counts}
        sizes |= {task: [len(chosen)] for task, chosen in self._chosen.items() if len(chosen) < counts[task]}
        probabilities = mixture({task: sum(of) for task, of in sizes.items()}, data.temperature, data.task_weights)
        self.order = Order(sizes, train.seed, probabilities, lanes)
        self._data = manifest.digests(sorted(counts))
        if state is not None:
            _check_state(state, self._state(self.order.start()))
        self.truncated = 0
        self._drawn = state.counts if state else self.order.start()
        self._planned: deque[_Step] = deque()  # not yet committed, oldest first
        self._given = 0  # how many of them the loop has been given
        self._collator = collator_for(config, tasks, tokenizer)
        self._tokens_per_byte = {task: self._measure(task) for task in counts} if train.micro_tokens else {}

    def __iter__(self) -> Generator[list[Batch], None, None]:
        self._planned.clear()
        self._given = 0
        steps = Steps(self._reader, self._collator, self.config)
        samples = self.config.train.global_batch // self.world_size
        for batches, holes, truncated in read_ahead(steps, self.config.data.workers, self._plan(), samples):
            self.truncated += truncated
            self._planned[self._given].holes += holes
            self._given += 1
            yield batches

    def samples(self, task: str, limit: int) -> list[Sample]:
        """At most `limit` of the samples that this stream draws of a task, spread over them, without damaged ones."""
        chosen = self._chosen[task]
        taken = min(limit, len(chosen))
        found = []
        for number in range(taken):
            try:
                found.append(self._reader.sample(task, TRAIN, chosen[number * len(chosen) // taken]))
            except DamagedSample:
                continue
        return found

    def commit(self) -> list[Hole]:
        """Counts the oldest step not yet committed as done, whether its update was applied or skipped.

        Returns the samples of it that this rank could not use.
        """
        assert self._given, "commit() without a step given out before"
        self._given -= 1
        step = self._planned.popleft()
        self._drawn = step.drawn
        return step.holes

    def state(self) -> StreamState:
        """The position after the last committed step; the same on every rank."""
        return self._state(self._drawn)

    def _state(self, drawn: Counts) -> StreamState:
        train = self.config.train
        copied = {task: list(lanes) for task, lanes in drawn.items()}
        samples = sum(map(sum, copied.values()))
        return StreamState(train.seed, dict(self._data), self.order.lanes, train.global_batch, samples, copied)

    def _plan(self) -> Iterator[tuple[list[Place], int]]:
        """This rank's places of step after step, and how many micro-batches they make; runs ahead of the reading."""
        train, lanes = self.config.train, self.order.lanes
        shares = [batching.share(train.global_batch, lanes, rank, self.world_size) for rank in range(self.world_size)]
        drawn, first = self._drawn, sum(map(sum, self._drawn.values()))
        while True:
            draws, drawn = self.order.draw(drawn, train.global_batch)
            own = [self._place(first + place, *draws[place]) for place in shares[self.rank]]
            parts = self.accumulation
            if train.micro_tokens:  # as many as the rank that needs most of them
                costs = [self._cost(self._place(first + place, *draw)) for place, draw in enumerate(draws)]
                parts = max(batching.needed([costs[i] for i in ranks], train.micro_tokens) for ranks in shares)
            self._planned.append(_Step(drawn))
            yield own, parts
            first += train.global_batch

    def _place(self, position: int, task: str, lane: int, draw: int) -> Place:
        return Place(position, task, self._chosen[task][self.order.locate(task, lane, draw)])

    def _cost(self, place: Place) -> batching.Cost:
        """About how many tokens a sample's source and target have."""
        rate = self._tokens_per_byte[place.task]
        source, target = self._reader.lengths(place.task, TRAIN, place.number)
        limit = self.config.data.max_source_length
        return min(limit, 1 + math.ceil(source * rate)), 1 + math.ceil(target * rate)

    def _measure(self, task: str) -> float:
        """Tokens that a byte of the task's sources makes."""
        samples = self.samples(task, _MEASURED)
        texts = [sample.source for sample in samples if sample.source]
        size = sum(len(text.encode()) for text in texts)
        return self._collator.count_tokens(texts) / size if size else 1.0


class Steps(Dataset[Any]):
    """Reads and collates a rank's places of one step; holds no position, so any worker may serve any step."""

    def __init__(self, reader: Reader, collator: Collator, config: Config) -> None:
        self.reader, self.collator = reader, collator
        self.weights, self.budget = config.data.loss_weights, config.train.micro_tokens
        self.shelf: Shelf | None = None

    def __getitems__(self, steps: list[tuple[list[tuple[Any, ...]], int, int | None]]) -> list[Packed]:
        """Steps as columns of places, a number of micro-batches and a slot of the shelf."""
        return [self.read([*map(Place, *places)], parts, slot) for places, parts, slot in steps]

    def read(self, places: list[Place], parts: int, slot: int | None = None) -> Packed:
        """The places as `parts` micro-batches. An error comes back as a value: torch would wrap one that is raised."""
        before = self.collator.truncated
        stack = _Stack(self.shelf, slot)
        try:
            batches, holes = read_batches(
                self.reader, self.collator, TRAIN, places, self.weights, parts, self.budget, stack
            )
        except (ValueError, Unreachable) as error:
            return ValueError(str(error)), [], 0, slot
        packed = [_packed(batch, images) for batch, images in itertools.zip_longest(batches, stack.stacked)]
        return packed, holes, self.collator.truncated - before, slot


class _Stack:
    """Lays the images of one micro-batch after the other on the shelf, or into a tensor if they have no room there."""

    def __init__(self, shelf: Shelf | None, slot: int | None) -> None:
        self.shelf, self.slot = shelf, slot
        self.stacked: list[Spot | Tensor] = []
        self.rows = 0

    def __call__(self, grids: Sequence[np.ndarray]) -> Tensor:
        spot = self.shelf.put(self.slot, self.rows, grids) if self.shelf else None
        self.rows += len(grids)
        images = self.shelf.get(spot) if self.shelf and spot else torch.from_numpy(np.stack(grids)).half()
        self.stacked.append(spot or images)
        return images


def read_ahead(
    steps: Steps | IterableDataset[Packed],
    workers: int,
    plan: Iterator[tuple[list[Place], int]] | None = None,
    samples: int = 1,
) -> Iterator[tuple[list[Batch], list[Hole], int]]:
    """Step after step as worker processes read them, or this one if there are none: a rank's micro-batches, what could
    not be used of them, and how many sources were cut.

    `steps` reads the items of `plan`, of `samples` samples each; or without a plan it is iterated in every worker.
    """
    shelf = None
    if isinstance(steps, Steps) and steps.collator.grid:
        shelf = steps.shelf = Shelf(workers, samples, steps.collator.grid)
    items: Any = plan and ((list(zip(*own, strict=True)), parts, shelf and shelf.take()) for own, parts in plan)
    for batches, holes, truncated, slot in in_turn(steps, workers, items, message_items(samples, bool(shelf))):
        if isinstance(batches, Exception):
            raise batches
        unpacked = [_unpacked(fields, shelf) for fields in batches]
        if shelf:
            shelf.free(slot)
        yield unpacked, holes, truncated


def check_vision(manifest: Manifest, config: Config) -> None:
    """The run must see the features that are stored, and answer new images through the encoder that made them."""
    stored, wanted = manifest.features, config.vision
    if stored is None or wanted.encoder is None:
        return
    made = {"cells": stored.cells, "channels": stored.channels, **stored.encoder}
    for name in ("cells", "channels", "encoder", "image_size", "stage"):
        if name in made and made[name] != getattr(wanted, name):
            raise ValueError(
                f"vision.{name} is {getattr(wanted, name)!r}, but the features of {manifest.path} have {made[name]!r}; "
                f"set it to that, or encode the pictures anew (data_prep/features.py)"
            )


def _check_state(state: StreamState, fresh: StreamState) -> None:
    for name in ("seed", "lanes", "global_batch"):
        if getattr(state, name) != getattr(fresh, name):
            raise ValueError(
                f"the stream to be continued has {name} {getattr(state, name)!r}, this run has {getattr(fresh, name)!r}"
            )
    shape, expected = ({task: len(lanes) for task, lanes in sorted(s.counts.items())} for s in (state, fresh))
    if shape != expected:
        raise ValueError(f"the stream to be continued has counts of {shape} (task: lanes), not {expected}")
    changed = [task for task, content in fresh.data.items() if state.data.get(task) != content]
    if changed:
        raise ValueError(f"the stream to be continued was on other shards of {', '.join(changed)} than there are now")
    total = sum(map(sum, state.counts.values()))
    if total != state.samples:
        raise ValueError(f"the stream to be continued has samples {state.samples}, but its counts sum to {total}")


def _packed(batch: Batch, images: Spot | Tensor | None) -> tuple[Any, ...]:
    """A batch as it passes between processes, `images` in place of its own.

    Tokens as arrays: each tensor costs a file descriptor and a round trip of its own. Images in the float16 that they
    are stored in, on the shelf, or else as a tensor, since torch's shared memory beats the pipe for them (together
    10 -> 4 ms a micro-batch of 16).
    """
    fields = batch._asdict() | {"images": images, "samples": pack_samples(batch.samples)}
    return tuple(field.numpy() if isinstance(field, Tensor) and field.ndim < 3 else field for field in fields.values())


def _unpacked(fields: tuple[Any, ...], shelf: Shelf | None) -> Batch:
    given = (torch.from_numpy(field) if isinstance(field, np.ndarray) else field for field in fields)
    values: dict[str, Any] = dict(zip(Batch._fields, given, strict=True))
    images = values["images"]
    if shelf and isinstance(images, Spot):
        images = shelf.get(images)
    # float() copies: the slot will be filled again
    values |= {"images": images if images is None else images.float(), "samples": unpack_samples(values["samples"])}
    return Batch(**values)
