"""How the benchmarks take time: every system in turn, round by round, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


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
