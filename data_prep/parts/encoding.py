"""Encodes pictures into feature cells, each once: on CPUs in several processes, on a GPU in this one.

Processes and not threads: where the cores are shared, the threads of one convolution wait for each other at every
layer, and two of them were slower than one. For a GPU, processes open and resize and this one does nothing else but
encode. This file must not know where pictures come from, nor what becomes of their cells.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from hyperpelt_ds.config import VisionConfig
from hyperpelt_ds.vision import Picture, UnreadableImage, VisionEncoder, load_encoder
from hyperpelt_ds.vision.images import read_batch

BATCH = 32  # pictures; more cost memory and, on a CPU, gain nothing

S = TypeVar("S")
T = TypeVar("T")


class Item(NamedTuple):
    """An image id and its pictures, whose cells come one after the other under that id."""

    image: str
    pictures: tuple[Picture, ...]


Result = tuple[str, np.ndarray | UnreadableImage]
"""An image id and its (V, F) float16 cells, or why there are none."""


def encode(
    batches: Iterable[Sequence[Item]], config: VisionConfig, workers: int, device: str = "cpu"
) -> Iterator[list[Result]]:
    """The results of each batch, in order; all items have the same number of pictures. With 0 workers all is done in
    this process. Reads at most a few batches ahead.

    Raises ValueError for an encoder that cannot be had, and for a worker that was ended from outside.
    """
    if device == "cpu":
        yield from _mapped(functools.partial(_read_and_encode, config), batches, workers)
    else:
        encoder = encoder_of(config, device)
        for read in _mapped(functools.partial(_read, encoder.image_size), batches, workers):
            yield _encode(encoder, read)


def encode_readable(items: Iterable[Item], config: VisionConfig, workers: int) -> Iterator[tuple[str, np.ndarray]]:
    """(image id, cells) of every item; raises UnreadableImage for the first that has none."""
    for image, cells in itertools.chain.from_iterable(encode(cut(items, BATCH), config, workers)):
        if isinstance(cells, UnreadableImage):
            raise cells
        yield image, cells


@functools.cache
def encoder_of(config: VisionConfig, device: str = "cpu") -> VisionEncoder:
    """The encoder of `config`, loaded once a process."""
    return load_encoder(config, device)


def begun(items: Iterator[T]) -> Iterator[T]:
    """The same items, once the first is there, so that what is timed from here on leaves out the start of processes."""
    return itertools.chain(list(itertools.islice(items, 1)), items)


def cut(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of `size`; the last may be shorter."""
    rest = iter(items)
    while part := list(itertools.islice(rest, size)):
        yield part


class _Read(NamedTuple):
    """A batch whose pictures were opened: the pixels (pictures, S, S, 3) of those items that have no error."""

    items: Sequence[Item]
    errors: dict[str, UnreadableImage]
    pixels: np.ndarray


def _read(size: int, items: Sequence[Item]) -> _Read:
    errors, pixels = {}, [np.empty((0, size, size, 3), np.uint8)]
    for item in items:
        try:
            pixels.append(read_batch(item.pictures, size))
        except UnreadableImage as error:
            errors[item.image] = error
    return _Read(items, errors, np.concatenate(pixels))


def _encode(encoder: VisionEncoder, read: _Read) -> list[Result]:
    good = [item for item in read.items if item.image not in read.errors]
    results: dict[str, np.ndarray | UnreadableImage] = {**read.errors}
    if good:
        pixels = torch.from_numpy(read.pixels)
        pixels = pixels.pin_memory() if encoder.device.type == "cuda" else pixels
        halves = encoder.encode_pixels(pixels).half().cpu()
        for item, cells in zip(good, halves.view(len(good), -1, encoder.channels).numpy(), strict=True):
            results[item.image] = cells if np.isfinite(cells).all() else _infinite(item)
    return [(item.image, results[item.image]) for item in read.items]


def _infinite(item: Item) -> UnreadableImage:
    return UnreadableImage(", ".join(map(str, item.pictures)), "its features are not finite in float16")


def _read_and_encode(config: VisionConfig, items: Sequence[Item]) -> list[Result]:
    encoder = encoder_of(config)
    return _encode(encoder, _read(encoder.image_size, items))


def _mapped(function: Callable[[Sequence[Item]], S], batches: Iterable[Sequence[Item]], workers: int) -> Iterator[S]:
    """`function` of each batch, in order. A pool's own `map` would take in all batches before it gives a result."""
    if not workers:
        yield from map(function, batches)
        return
    waiting: deque[tuple[Sequence[Item], Future[S]]] = deque()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start) as pool:
        try:
            for batch in itertools.chain(batches, itertools.repeat(None)):
                if batch is not None:
                    waiting.append((batch, pool.submit(function, batch)))
                if waiting and (batch is None or len(waiting) > 2 * workers):
                    yield waiting.popleft()[1].result()
                if batch is None and not waiting:
                    return
        except BrokenProcessPool:
            names = [item.image for batch, _ in waiting for item in batch]
            at = f" between images {names[0]!r} and {names[-1]!r}" if names else ""
            raise ValueError(f"a worker process was ended{at}: out of memory? Fewer workers take less") from None
        finally:
            for _, future in waiting:
                future.cancel()


def _start() -> None:
    """Of a worker: one thread, and an end with its parent, of which a killed one cannot tell it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)
