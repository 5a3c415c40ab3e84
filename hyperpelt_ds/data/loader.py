"""The endless training stream of one rank.

Its position is integers that follow what was committed to optimizer steps, never what was prefetched. This file must
not know the model, the engine or the loss; of processes it knows only rank and world size, as numbers.
"""

from __future__ import annotations

import math
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import TRAIN, Batch, Hole, Sample, StreamState
from hyperpelt_ds.data import batching
from hyperpelt_ds.data.choice import choose, count
from hyperpelt_ds.data.collate import Collator, collator_for
from hyperpelt_ds.data.folder import Unreachable
from hyperpelt_ds.data.holes import Place, read_batches
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.data.order import Counts, Order, default_lanes, mixture
from hyperpelt_ds.data.reader import DamagedSample, Reader

Packed = tuple[list[tuple[Any, ...]] | ValueError, list[Hole], int]
"""A rank's part of a step as it passes between processes: micro-batches (or why there are none), what could not be used
of them, and how many sources were cut."""

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
        lanes = data.lanes or default_lanes(train.global_batch)
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
        if state is not None:
            _check_state(state, self._state(self.order.start()))
        self.truncated = 0
        self._drawn = state.counts if state else self.order.start()
        self._planned: deque[_Step] = deque()  # not yet committed, oldest first
        self._given = 0  # how many of them the loop has been given
        self._collator = collator_for(config, tasks, tokenizer)
        self._tokens_per_byte = {task: self._measure(task) for task in counts} if train.micro_tokens else {}

    def __iter__(self) -> Iterator[list[Batch]]:
        self._planned.clear()
        self._given = 0
        steps = Steps(self._reader, self._collator, self.config)
        for batches, holes, truncated in read_ahead(steps, self.config.data.workers, self._plan()):
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
        data = self.manifest.digests(drawn)
        return StreamState(train.seed, data, self.order.lanes, train.global_batch, samples, copied)

    def _plan(self) -> Iterator[Any]:  # of what _Steps takes; torch's type for it is a list
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

    def __getitems__(self, step: tuple[list[Place], int]) -> Packed:
        return self.read(*step)

    def read(self, places: list[Place], parts: int) -> Packed:
        """The places as `parts` micro-batches. An error comes back as a value: torch would wrap one that is raised."""
        before = self.collator.truncated
        try:
            batches, holes = read_batches(self.reader, self.collator, TRAIN, places, self.weights, parts, self.budget)
        except (ValueError, Unreachable) as error:
            return ValueError(str(error)), [], 0
        return [_packed(batch) for batch in batches], holes, self.collator.truncated - before


def read_ahead(
    steps: Dataset[Any], workers: int, plan: Iterator[Any] | None = None
) -> Iterator[tuple[list[Batch], list[Hole], int]]:
    """Step after step as worker processes read them, or this one if there are none: a rank's micro-batches, what could
    not be used of them, and how many sources were cut.

    steps gives Packed: one for each item of `plan`, or without a plan by being iterated in every worker.
    """
    if workers:
        # before the fork, after which tokenizers would warn in every worker and set the same
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(
        steps,
        batch_size=None if plan is None else 1,  # 1 stands for none given, which a plan needs
        batch_sampler=plan,
        collate_fn=_same,
        num_workers=workers,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # else it would draw a seed from the global generator that dropout uses
    )
    for batches, holes, truncated in loader:
        if isinstance(batches, Exception):
            raise batches
        yield [_unpacked(fields) for fields in batches], holes, truncated


def check_vision(manifest: Manifest, config: Config) -> None:
    """The run must see the features that are stored, and answer new images through the encoder that made them."""
    stored, wanted = manifest.features, config.vision
    if stored is None or wanted.encoder is None:
        return
    made = {"cells": stored.cells, "channels": stored.channels, **stored.encoder}
    for name in ("cells", "channels", "encoder", "image_size", "stage"):
        if name in made and made[name] != getattr(wanted, name):
            raise ValueError(
                f"vision.{name} is {getattr(wanted, name)!r}, but the features of {manifest.path} have {made[name]!r}"
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


def _packed(batch: Batch) -> tuple[Any, ...]:
    """Token tensors as arrays: between processes each tensor costs a file descriptor and a round trip of its own.

    Images stay tensors, since shared memory beats the pipe for them (together 10 -> 4 ms a micro-batch of 16), and
    travel in the float16 that they are stored in.
    """
    arrays = (field.numpy() if isinstance(field, Tensor) and field.ndim < 3 else field for field in batch)
    packed = Batch._make(arrays)
    return tuple(packed._replace(images=None if packed.images is None else packed.images.half()))


def _unpacked(fields: tuple[Any, ...]) -> Batch:
    tensors: list[Any] = [torch.from_numpy(field) if isinstance(field, np.ndarray) else field for field in fields]
    batch = Batch(*tensors)
    return batch._replace(images=None if batch.images is None else batch.images.float())


def _same(item: Any) -> Any:
    return item


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the training process alone decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
