"""How the benchmarks take time: every system in turn, round by round, in one process; and what the machine can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def take_turns(systems: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every system in each of `rounds` rounds, after a warm-up round that does not count.

    They take turns, so that drift of the machine hits all alike. `device` is cpu or cuda.
    """
    import torch

    times: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds + 1):
        for name, action in systems.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            action()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def ceilings(device: str, dtype: Any) -> tuple[float, float]:
    """Bytes a second that a copy reads and writes on this machine, and FLOPs a second of a large matrix product."""
    import torch

    source = torch.empty(256 << 20 if device == "cuda" else 16 << 20, device=device)
    target = torch.empty_like(source)
    side = 8192 if device == "cuda" else 1024
    square = torch.randn(side, side, device=device).to(dtype)
    repeats = 20 if device == "cuda" else 1  # long enough for the clock to rise and the launch not to count

    def copy() -> None:
        for _ in range(repeats):
            target.copy_(source)

    def product() -> None:
        for _ in range(repeats):
            torch.mm(square, square)

    times = take_turns({"copy": copy, "product": product}, 9 if device == "cuda" else 5, device)
    copying, multiplying = (statistics.median(times[name]) / repeats for name in ("copy", "product"))
    return 2 * source.numel() * source.element_size() / copying, 2 * side**3 / multiplying
