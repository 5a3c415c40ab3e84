"""What the benchmarks share: every system takes its turn, round by round, in one process; what the machine can do; and
where the figures go."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
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


def keep(lines: Iterable[Mapping[str, Any]], out: str | None, page: str) -> None:
    """Writes the figures to `out`, if it is given, and says so and which page reads such figures."""
    if out:
        Path(out).write_text("".join(json.dumps(line) + "\n" for line in lines))
    say_kept(out, page)


def say_kept(out: str | None, page: str) -> None:
    """The last word of a benchmark: where its figures are, and which page explains them and shows ours."""
    print(f"wrote {out}, a figure a line (JSON)" if out else "not kept; --out FILE.jsonl writes them as lines of JSON")
    print(f"next: compare with ours in {page}, which says how they are taken")
