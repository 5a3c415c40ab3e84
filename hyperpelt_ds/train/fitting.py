"""The largest micro-batch that fits: peaks of memory at a few sizes, and a straight line through them.

All ranks take part in every trial and none is let run out of memory: a size is tried only if the line so far says that
it fits. It must not know what a batch holds or how a step is taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hyperpelt_ds import dist

MARGIN = 0.1
"""Share of the memory that is left alone: for fragments, and for batches that differ from the one that was tried."""

_STATUS, _PEAKS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Fit:
    """What was found, in bytes of the busiest rank. `largest` is 0 if not even one sample fits."""

    largest: int
    peaks: dict[int, int]
    budget: int


def most(samples: int, share: int) -> int:
    """How many samples data/batching.cut may put together where a micro-batch has so many in the mean."""
    return samples if samples == share else min(2 * samples, share - share // samples + 1)


def largest_micro_batch(
    attempt: Callable[[int], None], share: int, first: int, worst: Callable[[int, int], int] = lambda n, share: n
) -> Fit:
    """The largest divisor n of `share` samples, a rank's part of the global batch, for which the peak of
    worst(n, share) samples stays in the budget.

    attempt(n) goes forward and backward over n samples. On a GPU sizes double up to `share`; on a CPU, where a trial
    takes long, there are two, `first` and its double or half. Every rank calls it and gets the same.
    """
    sizes = _doubling(share) if dist.has_gpu() else sorted({first, 2 * first if 2 * first <= share else -(-first // 2)})
    held, room = _start()
    base, budget = max(dist.gather(held)), min(dist.gather(held + room))
    peaks: dict[int, int] = {}
    for size in sizes:
        if peaks and _line(peaks, base, size) > budget:
            break
        _start()
        full = False
        try:
            attempt(size)
        except torch.OutOfMemoryError:  # what a first trial may meet
            full = True
        if any(dist.gather(full)):
            break
        peaks[size] = max(dist.gather(_peak()))
    return Fit(largest(peaks, base, budget, share, worst) if peaks else 0, peaks, budget)


def largest(
    peaks: dict[int, int], base: int, budget: int, share: int, worst: Callable[[int, int], int] = lambda n, share: n
) -> int:
    """The largest divisor of `share` that fits the budget on the line through the trials; 0 for none.

    `base` is what was held before the first of them.
    """
    return max(
        (n for n in range(1, share + 1) if share % n == 0 and _line(peaks, base, worst(n, share)) <= budget), default=0
    )


def _doubling(share: int) -> list[int]:
    return [*(2**i for i in range(share.bit_length()) if 2**i < share), share]


def _line(peaks: dict[int, int], base: int, size: int) -> float:
    """The peak at `size` on a line through the last two trials, or from what was held before the only one.

    Never below the largest trial's up to its size, nor falling: what an allocator keeps can hide that a peak grew.
    """
    points: Sequence[tuple[int, int]] = sorted({0: base, **peaks}.items())
    (x, low), (most, high) = points[-2:]
    return max(low, high + (high - low) / (most - x) * (size - most)) if high > low else high


def _start() -> tuple[int, int]:
    """Begins a new peak; bytes that this process holds, and how many more it may."""
    if dist.has_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        free, total = torch.cuda.mem_get_info()
        return torch.cuda.memory_reserved(), int(free - MARGIN * total)
    _PEAKS.write_text("5")  # see proc(5): the peak becomes what is held now
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
    return _kib("VmRSS"), int((1 - MARGIN) * _available() / processes)


def _peak() -> int:
    return torch.cuda.max_memory_reserved() if dist.has_gpu() else _kib("VmHWM")


def _kib(name: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def _available() -> int:
    """Bytes that this machine, or the container that this process is in, can still give."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    limit, used = _GROUP / "memory.max", _GROUP / "memory.current"
    if limit.is_file() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
