"""The adapter op against its peers: generation and application at every site, forward and backward, side by side.

All systems of a case do the same work on the same numbers, in the same process, in turn:

    ours          all sites generated in one product, one op a site (the backend that a model would get)
    gather        the same generation, weights copied for every sample, plain bmm: what eager torch does
    compiled      gather under torch.compile
    grouped_mm    the same generation, F.grouped_mm over the sorted batch
    block         our op, weights generated at every site anew
    loop_task     a Python loop over the batch's tasks that generates at every site (HyperFormer's scheme)
    loop_example  a Python loop over samples that generates at every site
    per_token     weights repeated for every token (doc-to-lora's packed scheme); small cases only

The tests of the op run first; if they fail, no speed is printed. `ratio` is the median over rounds of a system's time
to ours in the same round.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command import run

PEERS = ("gather", "compiled", "grouped_mm", "block", "loop_task", "loop_example", "per_token")
DEFAULT_PEERS = tuple(name for name in PEERS if name != "compiled")


def bench_kernels(
    *,
    suite: str = "smoke",
    out: str | None = None,
    rounds: int = 7,
    systems: str = ",".join(DEFAULT_PEERS),
    tests: bool = True,
) -> None:
    """Time every case of a suite and write JSON lines (case, system, metric, median, min, max, ratio).

    Examples:
        python launch/bench_kernels.py --suite smoke --out bench_kernels.jsonl
        python launch/bench_kernels.py --suite gpu10 --out docs/bench_kernels_h100.jsonl

    Args:
        suite: smoke, cpu, gpu10 (one command of under ten minutes on a GPU) or full
        out: file for the JSON lines; a table is printed either way
        rounds: counted rounds after one warm-up round
        systems: peers to time, names separated by commas (compiled only if asked for: it takes a minute a case)
        tests: run the op's tests first and stop if they fail
    """
    from hyperpelt_ds.kernels.cases import ADAPTER_CASES, SUITES

    if suite not in SUITES:
        raise ValueError(f"--suite: expected one of {', '.join(SUITES)}, got {suite!r}")
    peers = tuple(name for name in systems.split(",") if name)
    for name in peers:
        if name not in PEERS:
            raise ValueError(f"--systems: unknown {name!r}; allowed are {', '.join(PEERS)}")
    if rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {rounds}")
    if out and not Path(out).resolve().parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {Path(out).parent}")
    if tests:
        _run_tests()
    import torch

    from hyperpelt_ds import dist

    device = dist.device().type
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    about = f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}, {str(dtype)[6:]}"
    rate, peak = _ceilings(device, dtype)
    print(f"{about}, {rounds} rounds; copy {rate / 1e9:.0f} GB/s, matrix product {peak / 1e9:.0f} GFLOP/s")
    lines = []
    for case in ADAPTER_CASES:
        if case.name in SUITES[suite]:
            lines += [{**line, "hardware": about} for line in _case(case, peers, rounds, device, dtype, rate)]
    if out:
        Path(out).write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(f"wrote {out}")


def _case(case: Any, peers: tuple[str, ...], rounds: int, device: str, dtype: Any, rate: float) -> list[dict[str, Any]]:
    """The results of one case, a line a system; printed as they come."""
    from hyperpelt_ds.kernels.adapter.plan import plan

    cost = plan(case, dtype, device, rate)
    assert cost.floor_s is not None
    print(f"{case.name}: {cost}")
    actions = _systems(case, ("ours", *peers), device, dtype)
    times = _rounds(actions, rounds, device)
    lines = []
    for system, seconds in times.items():
        ratios = [own / ours for own, ours in zip(seconds, times["ours"], strict=True)]
        median, low, high, ratio = statistics.median(seconds), min(seconds), max(seconds), statistics.median(ratios)
        line: dict[str, Any] = {"case": case.name, "system": system, "metric": "forward_backward_s"}
        line |= {"median": median, "min": low, "max": high}
        line |= {"ratio": ratio, "ratio_min": min(ratios), "ratio_max": max(ratios)}
        line |= {
            "flops": cost.flops,
            "bytes": cost.bytes,
            "floor_s": cost.floor_s,
            "of_copy_rate": cost.floor_s / median,
        }
        line |= _on_gpu(actions[system]) if device == "cuda" else {}
        lines.append(line)
        print(
            f"  {system:13} {median * 1e3:9.2f} ms [{low * 1e3:.2f}, {high * 1e3:.2f}]  "
            f"x{ratio:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]  {cost.floor_s / median:.0%} of the copy rate"
        )
    return lines


def _run_tests() -> None:
    """The op's tests; SystemExit-free: a red test raises ValueError, so that no speed is printed."""
    root = Path(__file__).resolve().parents[1]
    files = sorted(str(file) for file in (root / "tests").glob("test_kernels*.py"))
    command = [sys.executable, "-m", "pytest", "-x", "-q", *files]
    for marks in ("not slow and not gpu", "gpu"):
        done = subprocess.run([*command, "-m", marks], cwd=root, capture_output=True, text=True)
        if done.returncode not in (0, 5):  # 5: nothing to run
            raise ValueError(f"the op's tests fail, so there is nothing to time:\n{done.stdout[-3000:]}")


def _rounds(systems: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every system in every round; the systems take turns, so that drift of the machine hits all alike."""
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


def _ceilings(device: str, dtype: Any) -> tuple[float, float]:
    """Bytes a second that a copy reads and writes on this machine, and FLOPs a second of a large matrix product."""
    import torch

    source = torch.empty(256 << 20 if device == "cuda" else 16 << 20, device=device)
    target = torch.empty_like(source)
    side = 8192 if device == "cuda" else 1024
    square = torch.randn(side, side, device=device).to(dtype)
    times = _rounds({"copy": lambda: _drop(target.copy_(source)), "product": lambda: _drop(square @ square)}, 5, device)
    copy, product = (statistics.median(times[name]) for name in ("copy", "product"))
    return 2 * source.numel() * source.element_size() / copy, 2 * side**3 / product


def _on_gpu(action: Callable[[], None]) -> dict[str, int]:
    """The most memory that a pass takes beyond what is there before, and the kernels that it launches."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    peak = torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        action()
        torch.cuda.synchronize()
    launches = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events() or ())
    return {"peak_bytes": peak, "launches": launches}


def _systems(case: Any, names: tuple[str, ...], device: str, dtype: Any) -> dict[str, Callable[[], None]]:
    """One forward and backward pass through all sites of a case, for every system that can run it."""
    import torch

    from hyperpelt_ds.kernels import generate, index_batch

    def draw(*shape: int, std: float = 1.0) -> Any:
        return (torch.randn(shape, generator=generator) * std).to(device, dtype).requires_grad_()

    generator = torch.Generator().manual_seed(0)
    x = draw(case.samples, case.tokens, case.size)
    hyper = draw(case.sites, case.groups, case.hyper)
    weight = draw(case.parameters, case.hyper, std=(case.hyper * case.size) ** -0.5)
    bias, scale = draw(case.parameters, std=0.0), draw(case.sites)
    leaves = (x, hyper, weight, bias, scale)
    users = index_batch(case.ids, groups=case.groups, device=device)

    def all_sites(body: Callable[..., Any]) -> Callable[[], None]:
        def step() -> None:
            made = _split(generate(hyper, weight, bias), case)
            _backward(_through(body, x, zip(*(part.unbind() for part in (*made, scale)), strict=True)), leaves)

        return step

    def each_site(body: Callable[..., Any]) -> Callable[[], None]:
        def step() -> None:
            y = x
            for site in range(case.sites):
                y = body(y, hyper[site], weight, bias, scale[site])
            _backward(y, leaves)

        return step

    bodies = _bodies(case, users)
    repeated = case.samples * case.tokens * case.parameters * case.sites * dtype.itemsize
    made: dict[str, Callable[[], None]] = {}
    for name in names:
        if name == "per_token" and repeated > (64 << 30 if device == "cuda" else 1 << 30):
            continue
        if name == "loop_task" and not case.conditions:
            continue
        made[name] = (each_site if name in ("block", "loop_task", "loop_example") else all_sites)(bodies[name])
    return made


def _bodies(case: Any, users: Any) -> dict[str, Callable[..., Any]]:
    """What each system does at one site: from made weights, or from hyper-embeddings (block and the loops)."""
    import torch
    import torch.nn.functional as F

    from hyperpelt_ds.kernels import adapter, generate
    from hyperpelt_ds.kernels.adapter import SiteAdapter

    rows = users.ids.long()
    ends = users.ptr[1:].clone()
    of_task = [
        range(n * case.samples // case.groups, (n + 1) * case.samples // case.groups) for n in range(case.groups)
    ]

    def ours(x: Any, *made: Any) -> Any:
        return adapter(x, x, [SiteAdapter._make((*made, users, None, None))], "relu")

    def gather(x: Any, *made: Any) -> Any:
        return adapter(x, x, [SiteAdapter._make((*made, users, None, None))], "relu", backend="reference")

    def grouped_mm(x: Any, down: Any, down_bias: Any, up: Any, up_bias: Any, scale: Any) -> Any:
        flat, stops = x.flatten(0, 1), ends * case.tokens
        by_token = rows.repeat_interleave(case.tokens)
        h = torch.relu(F.grouped_mm(flat, down.contiguous(), offs=stops) + down_bias.index_select(0, by_token))
        y = F.grouped_mm(h, up.contiguous(), offs=stops) + up_bias.index_select(0, by_token)
        return x + scale * y.view_as(x)

    def per_token(x: Any, down: Any, down_bias: Any, up: Any, up_bias: Any, scale: Any) -> Any:
        of = [part.index_select(0, rows).repeat_interleave(case.tokens, 0) for part in (down, down_bias, up, up_bias)]
        flat = x.flatten(0, 1).unsqueeze(1)
        h = torch.relu(torch.bmm(flat, of[0]) + of[1].unsqueeze(1))
        return x + scale * (torch.bmm(h, of[2]) + of[3].unsqueeze(1)).view_as(x)

    def block(x: Any, hyper: Any, weight: Any, bias: Any, scale: Any) -> Any:
        return ours(x, *_split(generate(hyper, weight, bias), case), scale)

    def one(x: Any, made: Any, scale: Any) -> Any:
        down, down_bias, up, up_bias = _split(made, case)
        return x + scale * (torch.relu(x @ down + down_bias) @ up + up_bias)

    def loop_task(x: Any, hyper: Any, weight: Any, bias: Any, scale: Any) -> Any:
        parts = []
        for task, samples in enumerate(of_task):
            parts.append(one(x[samples.start : samples.stop], F.linear(hyper[task], weight, bias), scale))
        return torch.cat(parts)

    def loop_example(x: Any, hyper: Any, weight: Any, bias: Any, scale: Any) -> Any:
        made = (one(x[n], F.linear(hyper[row], weight, bias), scale) for n, row in enumerate(case.ids))
        return torch.stack(list(made))

    return dict(
        ours=ours,
        gather=gather,
        compiled=torch.compile(gather, dynamic=False),
        grouped_mm=grouped_mm,
        per_token=per_token,
        block=block,
        loop_task=loop_task,
        loop_example=loop_example,
    )


def _split(made: Any, case: Any) -> tuple[Any, ...]:
    """Packed rows (..., P) as down, down_bias, up, up_bias, the order in which the model's head packs them."""
    size, narrow = case.size, case.bottleneck
    down, down_bias, up, up_bias = made.split([size * narrow, narrow, narrow * size, size], dim=-1)
    return down.unflatten(-1, (size, narrow)), down_bias, up.unflatten(-1, (narrow, size)), up_bias


def _through(body: Callable[..., Any], x: Any, sites: Any) -> Any:
    for made in sites:
        x = body(x, *made)
    return x


def _backward(y: Any, leaves: tuple[Any, ...]) -> None:
    y.float().square().mean().backward()
    for leaf in leaves:
        leaf.grad = None


def _drop(_: Any) -> None:
    return None


if __name__ == "__main__":
    run(bench_kernels)
