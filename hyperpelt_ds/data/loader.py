"""The batches of a run: the endless training stream of one rank, and finite evaluation.

The stream's position is integers that follow what was committed to optimizer steps, never what was prefetched.
This file must not know the model, the engine or the loss; of processes it knows only (rank, world size) as numbers.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Batch, Sample, StreamState
from hyperpelt_ds.data.collate import Collator, collator_for
from hyperpelt_ds.data.order import Order, mixture
from hyperpelt_ds.data.reader import Reader
from hyperpelt_ds.data.shards import MANIFEST, Manifest, read_index
from hyperpelt_ds.tasks import get
from hyperpelt_ds.tasks.task import check_target

TRAIN, VALIDATION = "train", "validation"
Place = tuple[str, int]  # a task and the index of one of its samples


class TrainStream:
    """Iterating gives, for each optimizer step, this rank's list of `accumulation` micro-batches, without end.

    The global batch of a step is the next `train.global_batch` samples of the Order, the same for every world size.
    `commit` is to be called after each optimizer step; a new iterator starts after the last committed step.
    `truncated` counts the sources that were cut in the batches given out so far on this rank.
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
        """Raises ValueError for batch sizes, features, tasks or a state that do not fit; nothing is read before."""
        self.manifest, self.config = manifest, config
        self.rank, self.world_size = rank, world_size
        self.accumulation = _accumulation(config.train.global_batch, config.train.micro_batch, world_size)
        _check_features(manifest, config)
        self._reader = Reader(manifest)
        shots, salt = config.data.shots, str(config.train.seed)
        self._chosen = {
            task: _chosen(self._reader, task, TRAIN, count, shots, salt)
            for task, count in _counts(manifest, config.data.train_tasks or tasks, TRAIN).items()
        }
        counts = {task: len(chosen) for task, chosen in self._chosen.items()}
        probabilities = mixture(counts, config.data.temperature, config.data.task_weights)
        self.order = Order(counts, config.train.seed, probabilities)
        if state is not None:
            _check_state(state, self._state(dict.fromkeys(counts, 0)))
        self.truncated = 0
        self._drawn = dict(state.counts) if state else dict.fromkeys(counts, 0)
        self._planned: deque[dict[str, int]] = deque()  # the draws that follow each step not yet committed
        self._given = 0  # how many of those steps the loop has been given
        self._micro_batches = _MicroBatches(
            self._reader,
            collator_for(config, tasks, tokenizer),
            self.accumulation * world_size / config.train.global_batch,
        )

    def __iter__(self) -> Iterator[list[Batch]]:
        self._planned.clear()
        self._given = 0
        workers = self.config.data.workers
        if workers:
            # before the fork, after which tokenizers would warn in every worker and set the same
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        loader = DataLoader(
            self._micro_batches,
            batch_sampler=self._plan(),
            collate_fn=_same,
            num_workers=workers,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # else it would draw a seed from the global generator that dropout uses
        )
        step: list[Batch] = []
        for fields, truncated in loader:
            if isinstance(fields, ValueError):
                raise fields
            step.append(_unpacked(fields))
            self.truncated += truncated
            if len(step) == self.accumulation:
                self._given += 1
                yield step
                step = []

    def samples(self, task: str, limit: int) -> list[Sample]:
        """At most `limit` of the samples that this stream draws of a task."""
        return [self._reader.sample(task, TRAIN, index) for index in self._chosen[task][:limit]]

    def commit(self) -> None:
        """Counts the oldest step not yet committed as done, whether its update was applied or skipped."""
        assert self._given, "commit() without a step given out before"
        self._given -= 1
        self._drawn = self._planned.popleft()

    def state(self) -> StreamState:
        """The position after the last committed step; the same on every rank."""
        return self._state(self._drawn)

    def _state(self, drawn: dict[str, int]) -> StreamState:
        return StreamState(self.config.train.seed, self.manifest.digest, sum(drawn.values()), dict(drawn))

    def _plan(self) -> Iterator[list[Place]]:
        """The places of this rank's micro-batches, step after step; runs ahead of the reading."""
        drawn = self._drawn
        while True:
            places, drawn = self.order.draw(drawn, self.config.train.global_batch)
            places = [(task, self._chosen[task][number]) for task, number in places]
            self._planned.append(drawn)
            lengths = [self._reader.length(task, TRAIN, index) for task, index in places]
            yield from _share(places, lengths, self.config.train.micro_batch, self.rank, self.world_size)


class _MicroBatches(Dataset[Any]):
    """Reads and collates the places of one micro-batch; holds no position, so any worker may serve any of them.

    An error comes back as a value, so that the caller can raise itself and not torch's wrapping of it.
    """

    def __init__(self, reader: Reader, collator: Collator, weight: float) -> None:
        self.reader, self.collator, self.weight = reader, collator, weight

    def __getitems__(self, places: list[Place]) -> tuple[tuple[Any, ...] | ValueError, int]:
        before = self.collator.truncated
        try:
            batch = _read(self.reader, self.collator, TRAIN, places, [self.weight] * len(places))
        except ValueError as error:
            return error, 0
        return _packed(batch), self.collator.truncated - before


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
    takes the same samples of a task every time, those whose keys have the smallest hashes; 0 takes all.
    """
    reader = Reader(manifest)
    counts = _counts(manifest, tasks, split)
    places = [(task, i) for task in tasks for i in _chosen(reader, task, split, counts[task], limit_per_task)]
    places.sort(key=lambda place: reader.length(place[0], split, place[1]))
    batches = -(-len(places) // (batch_size * world_size)) * world_size
    for batch in range(rank, batches, world_size):
        start, end = (len(places) * edge // batches for edge in (batch, batch + 1))
        own = places[start:end]
        yield _read(reader, collator, split, own or places[:1], [1.0] * len(own) or [0.0])


def check_samples(manifest: Manifest, tasks: Sequence[str], collator: Collator, rank: int, world_size: int) -> None:
    """Reads this rank's share of all training and validation samples before the first step.

    Raises ValueError naming the sample for a target that is too long or none of its task's labels, a damaged sample,
    and an image without features: each would otherwise stop the run only when it is first drawn.
    """
    reader = Reader(manifest)
    if collator.grid and manifest.features:
        for shard in manifest.features.shards:  # one image of each, for the shape
            reader.image(read_index(manifest.folder / shard.path).keys[0])
    for task, split in itertools.product(tasks, (TRAIN, VALIDATION)):
        own = range(rank, manifest.count(task, split), world_size)
        for start in range(0, len(own), 1024):
            samples = [reader.sample(task, split, index) for index in own[start : start + 1024]]
            collator.targets(samples)
            for sample in samples:
                check_target(get(task), sample.key, sample.target)
            for sample in samples:
                if collator.grid and sample.image is not None and not reader.has_image(sample.image):
                    reader.images([sample])  # raises with the names


def read_texts(manifest: Manifest, task: str, split: str) -> list[Sample]:
    """All samples of one split of one task, in the order of the shards."""
    reader = Reader(manifest)
    return [reader.sample(task, split, index) for index in range(manifest.count(task, split))]


def _read(reader: Reader, collator: Collator, split: str, places: Sequence[Place], weights: Sequence[float]) -> Batch:
    samples = [reader.sample(task, split, index) for task, index in places]
    return collator(samples, reader.images(samples) if collator.grid else {}, weights)


def _share(
    places: Sequence[Place], lengths: Sequence[int], micro_batch: int, rank: int, world_size: int
) -> Iterator[list[Place]]:
    """This rank's micro-batches of a global batch: neighbours in length, dealt to and fro so that ranks cost the same.

    In each round all ranks are given micro-batches of neighbouring lengths, and the direction changes every round.
    """
    by_length = [places[i] for i in sorted(range(len(places)), key=lambda i: lengths[i])]
    for turn, start in enumerate(range(0, len(places), micro_batch * world_size)):
        seat = rank if turn % 2 == 0 else world_size - 1 - rank
        yield by_length[start + seat * micro_batch : start + (seat + 1) * micro_batch]


def _counts(manifest: Manifest, tasks: Sequence[str], split: str) -> dict[str, int]:
    counts = {task: manifest.count(task, split) for task in tasks}
    for task in tasks:
        if not counts[task]:
            raise ValueError(f"task {task!r} has no samples of split {split!r} in {manifest.folder / MANIFEST}")
    return counts


def _chosen(reader: Reader, task: str, split: str, count: int, limit: int, salt: str = "") -> Sequence[int]:
    """The places of `limit` samples (0: all), those whose keys have the smallest hashes under `salt`."""
    if not 0 < limit < count:
        return range(count)
    return sorted(range(count), key=lambda i: hashlib.sha256((salt + reader.key(task, split, i)).encode()).digest())[
        :limit
    ]


def _accumulation(global_batch: int, micro_batch: int, world_size: int) -> int:
    if global_batch % (micro_batch * world_size) == 0:
        return global_batch // (micro_batch * world_size)
    share = global_batch // world_size
    fitting = [m for m in range(1, share + 1) if global_batch % (m * world_size) == 0]
    allowed = f"micro-batches that fit: {fitting}" if fitting else "the world size does not divide the global batch"
    raise ValueError(
        f"train.global_batch {global_batch} is not a multiple of train.micro_batch {micro_batch} "
        f"x world size {world_size}; {allowed}"
    )


def _check_features(manifest: Manifest, config: Config) -> None:
    """The run must see the features that are stored, and answer new images through the encoder that made them."""
    stored, wanted = manifest.features, config.vision
    if stored is None or wanted.encoder is None:
        return
    made = {"cells": stored.cells, "channels": stored.channels, **stored.encoder}
    for name in ("cells", "channels", "encoder", "image_size", "stage"):
        if name in made and made[name] != getattr(wanted, name):
            raise ValueError(
                f"vision.{name} is {getattr(wanted, name)!r}, but the features of {manifest.folder / MANIFEST} "
                f"have {made[name]!r}"
            )


def _check_state(state: StreamState, fresh: StreamState) -> None:
    for name in ("seed", "manifest"):
        if getattr(state, name) != getattr(fresh, name):
            raise ValueError(
                f"the stream to be continued has {name} {getattr(state, name)!r}, this run has {getattr(fresh, name)!r}"
            )
    if set(state.counts) != set(fresh.counts):
        raise ValueError(f"the stream to be continued has counts of {sorted(state.counts)}, not {sorted(fresh.counts)}")
    if sum(state.counts.values()) != state.samples:
        raise ValueError(f"the stream to be continued has samples {state.samples}, but its counts are {state.counts}")


def _packed(batch: Batch) -> tuple[Any, ...]:
    """Token tensors as arrays: between processes each tensor costs a file descriptor and a round trip of its own.

    Images stay tensors, since shared memory beats the pipe for them (together 10 -> 4 ms a micro-batch of 16).
    """
    return tuple(field.numpy() if isinstance(field, Tensor) and field.ndim < 3 else field for field in batch)


def _unpacked(fields: tuple[Any, ...]) -> Batch:
    tensors: list[Any] = [torch.from_numpy(field) if isinstance(field, np.ndarray) else field for field in fields]
    return Batch(*tensors)


def _same(item: Any) -> Any:
    return item


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the training process alone decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
