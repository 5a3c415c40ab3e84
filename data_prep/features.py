"""Encodes images into feature cells, each once, in several processes.

Processes and not threads: where the cores are shared, the threads of one convolution wait for each other at every
layer, and two of them were slower than one.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import sources
import torch

from hyperpelt_ds.config import VisionConfig
from hyperpelt_ds.vision import VisionEncoder, load_encoder

BATCH = 32


def encode(wheel: Path, images: Sequence[str], config: VisionConfig, workers: int) -> Iterator[tuple[str, np.ndarray]]:
    """(image id, (V, F) float16) for each of the ids, in their order; prints progress every few seconds."""
    chunks = [images[first : first + BATCH] for first in range(0, len(images), BATCH)]
    done, start, reported = 0, 0.0, 0.0
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for chunk, cells in zip(chunks, pool.map(functools.partial(_encode, wheel, config), chunks), strict=True):
            yield from zip(chunk, cells, strict=True)
            now, done = time.monotonic(), done + len(chunk)
            if not start:  # the first chunk waited for the processes to start
                start = reported = now
            elif now - reported > 3 or done == len(images):
                rate, reported = (done - len(chunks[0])) / (now - start), now
                left = (len(images) - done) / rate
                print(f"encoded {done:,} of {len(images):,} images, {rate:.0f} a second, {left:.0f} s left", flush=True)


def _encode(wheel: Path, config: VisionConfig, images: Sequence[str]) -> np.ndarray:
    cells = _encoder(config).encode([picture for _, picture in sources.pictures(wheel, images)])
    return cells.half().numpy()


@functools.cache
def _encoder(config: VisionConfig) -> VisionEncoder:
    """One a process, which then computes on one thread."""
    torch.set_num_threads(1)
    return load_encoder(config)
