"""The adapter op against its peers: generation and application at every site, forward and backward, side by side; and
low-rank deltas against peft's mixed batch, forward only.

All systems of a case do the same work on the same numbers, in the same process, in turn:

    ours          all sites generated in one product, one op a site (the backend that a model would get)
    gather        the same generation, weights copied for every sample, plain bmm: what eager torch does
    compiled      gather under torch.compile
    grouped_mm    the same generation, F.grouped_mm over the sorted batch
    block         our op, weights generated at every site anew
    loop_task     a Python loop over the batch's tasks that generates at every site (HyperFormer's scheme)
    loop_example  a Python loop over samples that generates at every site
    per_token     weights repeated for every token (doc-to-lora's packed scheme); small cases only
    half_padded   our op where every other sample is padding but for one token, and told so

Attention with prefixes comes with it (prefix_peers.py has its systems, of which `copied` takes the place of `ours`).
    chunked       ours with as few sites generated at a time as are worthwhile, and again in backward; with live bytes

On a linear map with a low-rank delta for each condition, whose weights are there, without gradients:

    ours              the map, and the op on its output
    gather            the map, and weights copied for every sample
    peft_mixed_batch  peft's LoRA layer told the adapter of every sample: the map, and a loop over the batch's adapters

The tests of the op run first; if they fail, no speed is printed. `ratio` is the median over rounds of a system's time
to ours in the same round.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command import run
from kernel_peers import DEFAULT_PEERS, PEERS, low_rank_systems, systems
from prefix_peers import systems as prefix_systems
from turns import take_turns

STEPS = {
    "t5_base": (64, 64, 8, dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)),
    "t5_xxl_6x6_layers": (16, 64, 8, dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=6, num_heads=64)),
    "tiny": (4, 8, 4, dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)),
}
"""Samples, source and target tokens, and shape of the models whose train step is timed."""
SUITE_STEPS = dict.fromkeys(("gpu10", "full"), ("t5_base", "t5_xxl_6x6_layers"))


def bench_kernels(
    *,
    suite: str = "smoke",
    out: str | None = None,
    rounds: int = 7,
    peers: str = ",".join(DEFAULT_PEERS),
    steps: str | None = None,
    tests: bool = True,
) -> None:
    """Time every case of a suite and write JSON lines (case, system, metric, median, min, max, ratio).

    Examples:
        python launch/bench_kernels.py --suite smoke --out bench_kernels.jsonl
        python launch/bench_kernels.py --suite gpu10 --out docs/bench_kernels_h100.jsonl

    Args:
        suite: smoke, cpu, gpu10 (one command of under ten minutes on a GPU), chunks, low_rank or full
        out: file for the JSON lines; a table is printed either way
        rounds: counted rounds after one warm-up round
        peers: systems to time beside ours, names separated by commas; compiled only if asked for, it takes a minute a
            case
        steps: models whose train step is timed with and without the op, of t5_base, t5_xxl_6x6_layers and tiny; the
            first two in gpu10 and full unless given
        tests: run the op's tests first and stop if they fail
    """
    from hyperpelt_ds.kernels.cases import ADAPTER_CASES, LOW_RANK_CASES, PREFIX_CASES, SUITES

    if suite not in SUITES:
        raise ValueError(f"--suite: expected one of {', '.join(SUITES)}, got {suite!r}")
    names = tuple(name for name in peers.split(",") if name)
    for name in names:
        if name not in PEERS:
            raise ValueError(f"--peers: unknown {name!r}; allowed are {', '.join(PEERS)}")
    for name in steps.split(",") if steps else ():
        if name not in STEPS:
            raise ValueError(f"--steps: unknown {name!r}; allowed are {', '.join(STEPS)}")
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
    for case in (*ADAPTER_CASES, *LOW_RANK_CASES):
        if case.name in SUITES[suite]:
            lines += [{**line, "hardware": about} for line in _case(case, names, rounds, device, dtype, rate)]
    for prefix_case in PREFIX_CASES:
        if prefix_case.name in SUITES[suite]:
            print(prefix_case.name)
            actions = prefix_systems(prefix_case, device, dtype)
            made = _compared(prefix_case.name, actions, "copied", rounds, device)
            lines += [{**line, "hardware": about} for line in made]
    for name in (name for name in steps.split(",") if name) if steps is not None else SUITE_STEPS.get(suite, ()):
        lines += [{**line, "hardware": about} for line in _step(name, rounds, device, dtype, peak)]
    if out:
        Path(out).write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(f"wrote {out}")


def _case(case: Any, peers: tuple[str, ...], rounds: int, device: str, dtype: Any, rate: float) -> list[dict[str, Any]]:
    """The results of one case, a line a system; printed as they come."""
    from hyperpelt_ds.kernels import plan
    from hyperpelt_ds.kernels.cases import AdapterCase

    if not isinstance(case, AdapterCase):
        print(f"{case.name}: forward only")
        actions = low_rank_systems(case, ("ours", *peers), device, dtype)
        return _compared(case.name, actions, "ours", rounds, device, metric="forward_s")
    (cost,) = plan(case, dtype=dtype, device=device, rate=rate).costs
    assert cost.floor_s is not None
    print(f"{case.name}: {cost}")
    actions = systems(case, ("ours", *peers), device, dtype)
    lines = _compared(case.name, actions, "ours", rounds, device, cost.floor_s)
    known = {"flops": cost.flops, "bytes": cost.bytes, "floor_s": cost.floor_s}
    for line in lines:
        line |= {**known, "of_copy_rate": cost.floor_s / line["median"]}
        if "chunked" in actions and line["system"] in ("ours", "chunked"):
            line["live_bytes"] = _live(actions[line["system"]])
            print(f"  {line['system']}: {line['live_bytes'] / 1e6:.0f} MB live")
    return lines


def _compared(
    case: str,
    actions: dict[str, Callable[[], None]],
    base: str,
    rounds: int,
    device: str,
    floor: float | None = None,
    metric: str = "forward_backward_s",
) -> list[dict[str, Any]]:
    """A line for every system, its time beside that of `base` in the same round; printed as they come."""
    times = take_turns(actions, rounds, device)
    lines = []
    for system, seconds in times.items():
        ratios = [own / other for own, other in zip(seconds, times[base], strict=True)]
        median, low, high, ratio = statistics.median(seconds), min(seconds), max(seconds), statistics.median(ratios)
        line: dict[str, Any] = {"case": case, "system": system, "metric": metric}
        line |= {"median": median, "min": low, "max": high}
        line |= {"ratio": ratio, "ratio_min": min(ratios), "ratio_max": max(ratios)}
        line |= _on_gpu(actions[system]) if device == "cuda" else {}
        lines.append(line)
        print(
            f"  {system:16} {median * 1e3:9.2f} ms [{low * 1e3:.2f}, {high * 1e3:.2f}]  "
            f"x{ratio:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
            + ("" if floor is None else f"  {floor / median:.0%} of the copy rate")
        )
    return lines


def _run_tests() -> None:
    """The op's tests, those for a GPU where there is one; a red one raises ValueError, so that no speed is printed."""
    import torch

    root = Path(__file__).resolve().parents[1]
    found = sorted((root / "tests").glob("test_kernels*.py"))
    files = [str(file) for file in found if file.name != "test_kernels_bench.py"]
    command = [sys.executable, "-m", "pytest", "-x", "-q", *files]
    for marks in ("not slow and not gpu", *(["gpu"] if torch.cuda.is_available() else [])):
        done = subprocess.run([*command, "-m", marks], cwd=root, capture_output=True, text=True)
        if done.returncode not in (0, 5):  # 5: nothing to run
            print(done.stdout[-3000:], file=sys.stderr)
            raise ValueError("the ops' tests fail (see above), so there is nothing to time")


def _ceilings(device: str, dtype: Any) -> tuple[float, float]:
    """Bytes a second that a copy reads and writes on this machine, and FLOPs a second of a large matrix product."""
    import torch

    source = torch.empty(256 << 20 if device == "cuda" else 16 << 20, device=device)
    target = torch.empty_like(source)
    side = 8192 if device == "cuda" else 1024
    square = torch.randn(side, side, device=device).to(dtype)
    times = take_turns(
        {"copy": lambda: _drop(target.copy_(source)), "product": lambda: _drop(square @ square)}, 5, device
    )
    copy, product = (statistics.median(times[name]) for name in ("copy", "product"))
    return 2 * source.numel() * source.element_size() / copy, 2 * side**3 / product


def _live(action: Callable[[], object]) -> int:
    """The most bytes of tensors that a pass makes and holds at a time."""
    from live_bytes import LiveBytes

    with LiveBytes() as live:
        action()
    return live.peak


def _on_gpu(action: Callable[[], object]) -> dict[str, int]:
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


def _step(name: str, rounds: int, device: str, dtype: Any, peak: float) -> list[dict[str, Any]]:
    """A train step of HyperPELT on a T5 of the named shape, eight tasks in the batch: with the op as models get it,
    with weights copied for every sample, with prefixes merged, and the frozen model's own forward and backward to its
    inputs."""
    from unittest.mock import patch

    import torch

    from hyperpelt_ds.backbones import Backbone, random_model
    from hyperpelt_ds.config import Config
    from hyperpelt_ds.contracts import Batch, Sample
    from hyperpelt_ds.kernels import dispatch
    from hyperpelt_ds.kernels.prefix_attention import CPU, CUDA, MERGED
    from hyperpelt_ds.model import HyperPELT

    samples, source, target, shape = STEPS[name]
    settings = dict(vocab_size=32128, dropout_rate=0.0, decoder_start_token_id=0, **shape)
    config = Config().override(["modules.prefix_length=16", "modules.bottleneck=64"])
    model = HyperPELT(
        config,
        Backbone(random_model("t5", **settings).to(dtype), None, config.modules),
        [f"task{n}" for n in range(8)],
    )
    model.to_device(torch.device(device)).train()
    batch = Batch(
        input_ids=torch.randint(3, 32128, (samples, source)),
        attention_mask=torch.ones((samples, source), dtype=torch.long),
        labels=torch.randint(3, 32128, (samples, target)),
        targets=torch.arange(samples * target),
        tasks=torch.arange(8),
        task_rows=torch.arange(samples) * 8 // samples,
        images=None,
        image_rows=None,
        loss_weights=torch.full((samples,), 1 / samples),
        samples=tuple(Sample(str(n), "task0", "", "") for n in range(samples)),
    ).to(torch.device(device))
    frozen = random_model("t5", **settings).to(device, dtype).requires_grad_(False).train()

    def step() -> None:
        model(batch).loss.backward()
        model.zero_grad()

    def copied() -> None:
        with patch.object(dispatch, "choose", lambda *_: "reference"):
            step()

    def merged() -> None:
        with patch.dict(MERGED, {device: CUDA if device == "cuda" else CPU}):
            step()

    def floor() -> None:
        embedded = frozen.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
        frozen(inputs_embeds=embedded, labels=batch.labels, use_cache=False).loss.backward()

    actions = {"ours": step, "gather": copied, "merged": merged, "floor": floor}
    times = take_turns(actions, rounds, device)
    stacks = {"encoder": source, "decoder": target}
    flops = 4 * samples * sum(  # forward, and backward to the inputs: no gradients of frozen matrices
        tokens * sum(p.numel() for n, p in frozen.named_parameters() if n.startswith(stack) and p.ndim == 2)
        for stack, tokens in stacks.items()
    )  # fmt: skip
    lines = []
    for system, seconds in times.items():
        ratios = [own / ours for own, ours in zip(seconds, times["ours"], strict=True)]
        median, ratio = statistics.median(seconds), statistics.median(ratios)
        line: dict[str, Any] = {"case": f"step {name}", "system": system, "metric": "forward_backward_s"}
        line |= {"median": median, "min": min(seconds), "max": max(seconds), "ratio": ratio}
        lines.append({**line, "mfu": flops / median / peak})
        print(
            f"step {name:18} {system:8} {median * 1e3:9.2f} ms [{min(seconds) * 1e3:.2f}, {max(seconds) * 1e3:.2f}]  "
            f"x{ratio:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]  {flops / median / peak:.0%} of the product's rate"
        )
    return lines


def _drop(_: Any) -> None:
    return None


if __name__ == "__main__":
    run(bench_kernels)
