"""How what worker processes read crosses to the process that trains.

Between processes everything costs: a message through torch's loader 0.3 ms of both together, a tensor a file descriptor
and fresh pages of shared memory. So several small steps go in one message, samples as columns, and both messages and
image features lie in memory that was shared before the workers began. This file must not know files, tokens or the
order of a run.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hyperpelt_ds.contracts import Sample

MESSAGE = 1024
"""Samples without images that a message holds, once a run is under way, if fewer make a step."""
AHEAD = 2
"""Messages that each worker is asked for at a time."""
SLOT_BYTES = 1 << 20
"""Of shared memory for a message; pages that are never written cost nothing."""
_NOT_FOR_WORKERS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl: a signal for when the parent is gone


def pack_samples(samples: Iterable[Sample]) -> list[tuple[Any, ...]]:
    """The fields of samples, one tuple a field: that crosses faster than the samples do."""
    return list(zip(*samples, strict=True))


def unpack_samples(columns: Sequence[tuple[Any, ...]]) -> tuple[Sample, ...]:
    """The samples that `pack_samples` was given."""
    return tuple(map(Sample._make, zip(*columns, strict=True)))


class Spot(NamedTuple):
    """Rows start .. end of one slot of a Shelf."""

    slot: int
    start: int
    end: int


class Shelf:
    """Memory that a process shares with the workers it forks: slots of `rows` float16 arrays of one shape, as many as
    `workers` can be at work on and one more.

    The process that trains lends a slot with each item of work (`take`), a worker fills it (`put`), and once the
    process has made use of the arrays (`get`) it frees the slot. So the same pages are used again and again: to copy
    75 KB into them takes 2 us, into fresh pages of shared memory 70. In a worker that was not forked there is no room.
    """

    def __init__(self, workers: int, rows: int, shape: tuple[int, ...]) -> None:
        self.rows, self.shape = rows, shape
        slots = workers * AHEAD + 1
        size = slots * rows * math.prod(shape)
        self._free = list(range(slots))
        # not torch's shared memory: that lies in /dev/shm, which containers give 64 MB
        memory: Any = mmap.mmap(-1, 2 * size) if size else b""
        self._arrays = np.frombuffer(memory, np.float16).reshape(slots, rows, *shape)

    def __reduce__(self) -> tuple[type[Shelf], tuple[int, int, tuple[int, ...]]]:
        return Shelf, (0, 0, self.shape)

    def take(self) -> int | None:
        """A free slot, if there is one."""
        return self._free.pop() if self._free else None

    def free(self, slot: int | None) -> None:
        """Ends the use of a slot: what `get` gave of it may change from now on."""
        if slot is not None:
            self._free.append(slot)

    def put(self, slot: int | None, start: int, arrays: Sequence[np.ndarray]) -> Spot | None:
        """Copies arrays into a slot, from row `start` on; None without a slot, or without room in it."""
        end = start + len(arrays)
        if slot is None or end > self.rows:
            return None
        np.stack(arrays, out=self._arrays[slot, start:end], casting="same_kind")
        return Spot(slot, start, end)

    def get(self, spot: Spot) -> Tensor:
        """(rows, *shape) float16, the shared memory itself."""
        return torch.from_numpy(self._arrays[spot.slot, spot.start : spot.end])


def in_turn(dataset: Dataset[Any], workers: int, plan: Iterable[Any] | None = None, group: int = 1) -> Iterator[Any]:
    """What `dataset.__getitems__` makes of the items of `plan`, in their order; or, without a plan, what iterating the
    data set in every worker gives.

    `__getitems__` takes a list of items and gives a list of as many. Of worker processes each is asked for at most
    AHEAD messages of `group` items at a time; with none this process does the work itself, as it is asked for.
    """
    if workers:
        # before the fork, after which tokenizers would warn in every worker and set the same
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if plan is None:
        return _loader(dataset, workers, None)
    if not workers:
        return itertools.chain.from_iterable(_loader(dataset, 0, ([item] for item in plan)))
    mail = _Mail(dataset, workers * AHEAD + 1)
    messages = _loader(mail, workers, map(mail.address, _messages(iter(plan), workers * AHEAD, group)))
    return itertools.chain.from_iterable(map(mail.open, messages))


def _loader(dataset: Any, workers: int, sampler: Any) -> Iterator[Any]:
    loader = DataLoader(
        dataset,
        batch_size=None if sampler is None else 1,  # 1 stands for none given, which a sampler of batches needs
        batch_sampler=sampler,
        collate_fn=_same,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        worker_init_fn=_begin,
        generator=torch.Generator(),  # else it would draw a seed from the global generator that dropout uses
    )
    before = multiprocessing.active_children()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)  # until each of them ignores these signals
    iterator = iter(loader)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    own = [worker for worker in multiprocessing.active_children() if worker not in before]
    weakref.finalize(iterator, _end, own, os.getpid())
    return iterator


def _end(workers: list[BaseProcess], parent: int) -> None:
    """At the end of the iterator, or else of the process, which would wait for workers that heed no SIGTERM."""
    left = [worker for worker in workers if worker.is_alive()] if os.getpid() == parent else []
    if left:
        # torch's handler raises when a worker dies; only the main thread may set one, and meets it
        mine = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if mine else None
        for worker in left:
            worker.kill()
            worker.join()
        if mine:
            signal.signal(signal.SIGCHLD, before)


class _Mail:
    """A data set whose messages lie in memory that was shared before the workers were forked.

    A pipe holds 64 KB, so that a worker with a large message and the process that reads it wait for each other again
    and again. What does not fit goes through the pipe, and so does everything from a worker that was not forked.
    """

    def __init__(self, dataset: Any, slots: int) -> None:
        self.dataset = dataset
        self._size = SLOT_BYTES if slots else 0
        self._memory: Any = mmap.mmap(-1, slots * SLOT_BYTES) if slots else b""
        self._free = list(range(slots))

    def __reduce__(self) -> tuple[type[_Mail], tuple[Any, int]]:
        return _Mail, (self.dataset, 0)

    def address(self, items: list[Any]) -> tuple[int, list[Any]]:
        """The items of a message and the slot that it is to be put in. There is one for every message under way."""
        return self._free.pop(), items

    def __getitems__(self, addressed: tuple[int, list[Any]]) -> tuple[int, int | bytes]:
        """In a worker: the slot, and how many bytes of it are the message, or the message itself."""
        slot, items = addressed
        message = ForkingPickler.dumps(self.dataset.__getitems__(items))
        if len(message) > self._size:
            return slot, bytes(message)
        start = slot * SLOT_BYTES
        self._memory[start : start + len(message)] = message
        return slot, len(message)

    def open(self, sent: tuple[int, int | bytes]) -> list[Any]:
        """What a worker made of a message's items; its slot is free again."""
        slot, message = sent
        if isinstance(message, int):
            start = slot * SLOT_BYTES
            message = self._memory[start : start + message]
        self._free.append(slot)
        return pickle.loads(message)


def message_items(samples: int, images: bool) -> int:
    """How many items of so many samples go in a message. With images it costs little beside what is in it."""
    return 1 if images else max(1, MESSAGE // samples)


def _messages(plan: Iterator[Any], single: int, group: int) -> Iterator[list[Any]]:
    """The items of each message: the first `single` hold one, so that a run begins at once."""
    for size in itertools.chain(itertools.repeat(1, single), itertools.repeat(group)):
        items = list(itertools.islice(plan, size))
        if not items:
            return
        yield items


def _same(item: Any) -> Any:
    return item


def _begin(worker: int) -> None:
    """In a worker, before it works. Signals reach the whole process group, and launchers send them to workers first;
    the training process alone decides what they mean, and no worker outlives it. What was inherited is never garbage:
    to look through it again and again would copy page after page of it."""
    for number in _NOT_FOR_WORKERS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOT_FOR_WORKERS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    gc.freeze()
