"""What one pass costs a GPU: the time and number of its kernels by name, and memory; and a pass as a CUDA graph.

Wall-clock time of small kernels is the host's. `gpu_s` leaves the host out: it is the sum over kernels, which run one
after the other. CUDA alone; it knows nothing of what a pass does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

NAMED = 20
"""Kernels that are told apart, those that take the most time."""


def on_gpu(action: Callable[[], object], kernels: bool) -> dict[str, Any]:
    """peak_bytes beyond what is there before; with `kernels`, launches, gpu_s, and kernels {name: [launches, seconds]}.

    To look at kernels costs some 50 us for each.
    """
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    if not kernels:
        return {"peak_bytes": peak}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        action()
        torch.cuda.synchronize()
    count: Counter[str] = Counter()
    seconds: Counter[str] = Counter()  # of floats, which it adds up as well
    for event in profile.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count[event.name] += 1
            seconds[event.name] += event.time_range.elapsed_us() / 1e6
    most = {name[:80]: [count[name], time] for name, time in seconds.most_common(NAMED)}
    return {"peak_bytes": peak, "launches": count.total(), "gpu_s": sum(seconds.values()), "kernels": most}


def captured(action: Callable[[], None]) -> Callable[[], None]:
    """The action as a CUDA graph: launched as a whole, so that the host's part is gone."""
    import torch

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            action()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()

    def replay() -> None:
        graph.replay()

    return replay
