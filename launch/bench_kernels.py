"""The adapter op against its peers: generation and application at every site, forward and backward, side by side; and
low-rank deltas against peft's mixed batch, forward only.

All systems of a case do the same work on the same numbers, in the same process, in turn:

    ours          all sites generated in one product, one op a site (the backend that a model would get)
    graph         ours as a CUDA graph
    gather        the same generation, weights copied for every sample, plain bmm: what eager torch does
    compiled      gather under torch.compile
    eager_bmm     weights generated for every sample at every site, plain bmm: what would be written first
    generation    nothing but the product that makes all weights, forward
    grouped_mm    the same generation, F.grouped_mm over the sorted batch
    block         our op, weights generated at every site anew
    loop_task     a Python loop over the batch's tasks that generates at every site (HyperFormer's scheme)
    loop_example  a Python loop over samples that generates at every site
    per_token     weights repeated for every token (doc-to-lora's packed scheme); small cases only
    half_padded   our op where every other sample is padding but for one token, and told so

    chunked       ours with as few sites generated at a time as are worthwhile, and again in backward; with live bytes

Attention with prefixes comes with it (prefix_peers.py has its systems, of which `copied` takes the place of `ours`),
and train steps of whole models (kernel_steps.py).

On a linear map with a low-rank delta for each condition, whose weights are there, without gradients:

    ours              the map, and the op on its output
    gather            the map, and weights copied for every sample
    peft_mixed_batch  peft's LoRA layer told the adapter of every sample: the map, and a loop over the batch's adapters

The tests of an op run first; while they fail, no speed of it is printed. `ratio` is the median over rounds of a
system's time to ours in the same round. Lines are written as they come, so that a run that is cut short leaves what it
had. A system that cannot run here is left out, with the reason in its line. On a GPU a line has the time of its kernels
alone too (`gpu_s`), and the goals are judged at the end (kernel_goals.py).
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import kernel_goals
import kernel_steps
from command import run
from gpu_profile import on_gpu
from kernel_peers import DEFAULT_PEERS, PEERS, low_rank_systems, systems
from prefix_peers import systems as prefix_systems
from turns import ceilings, say_kept, take_turns

ROOT = Path(__file__).resolve().parents[1]
SUITE_STEPS = dict.fromkeys(("gpu10", "full"), ("t5_base", "t5_xxl_6x6_layers", "t5_base_images", "t5_base_long"))
OPS = ("adapters", "prefixes")
PARTIAL = ("generation", "half_padded")
"""They do less than the bytes and FLOPs of their case."""
LATE = {"compiled": kernel_goals.COMPILED_CASES, "graph": kernel_goals.GRAPH_CASES}

Line = dict[str, Any]


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
        python launch/bench_kernels.py --suite gpu10 --out docs/results/kernels_h200.jsonl

    Args:
        suite: smoke, cpu, gpu10 (one command of under ten minutes on a GPU), chunks, low_rank or full
        out: file for the JSON lines, written as they come; a table is printed either way
        rounds: counted rounds after one warm-up round
        peers: systems to time beside ours, names separated by commas; `compiled` takes up to a minute a case, and is
            timed in three cases of gpu10 unasked
        steps: models whose train step is timed with and without the op, of t5_base, t5_base_long, t5_base_images,
            t5_xxl_6x6_layers, tiny and tiny_images; the first four in gpu10 and full unless given
        tests: run the ops' tests first and time nothing of an op whose tests fail
    """
    from hyperpelt_ds.kernels.cases import ADAPTER_CASES, LOW_RANK_CASES, PREFIX_CASES, SUITES

    if suite not in SUITES:
        raise ValueError(f"--suite: expected one of {', '.join(SUITES)}, got {suite!r}")
    names = tuple(name for name in peers.split(",") if name)
    for name in names:
        if name not in PEERS:
            raise ValueError(f"--peers: unknown {name!r}; allowed are {', '.join(PEERS)}")
    chosen_steps = tuple(n for n in steps.split(",") if n) if steps is not None else SUITE_STEPS.get(suite, ())
    for name in chosen_steps:
        if name not in kernel_steps.STEPS:
            raise ValueError(f"--steps: unknown {name!r}; allowed are {', '.join(kernel_steps.STEPS)}")
    if rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {rounds}")
    if out and not Path(out).resolve().parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {Path(out).parent}")
    red = _red_ops(ROOT / "tests") if tests else []
    if red == list(OPS):
        raise ValueError("the ops' tests fail (see above), so there is nothing to time")

    bench = _Bench(rounds, out)
    for case in (*ADAPTER_CASES, *LOW_RANK_CASES) if "adapters" not in red else ():
        if case.name in SUITES[suite]:
            bench.case(case, names)
    for prefix_case in PREFIX_CASES if "prefixes" not in red else ():
        if prefix_case.name in SUITES[suite]:
            print(prefix_case.name)
            bench.compare(prefix_case.name, prefix_systems(prefix_case, bench.device, bench.dtype), "copied")
    for name in chosen_steps if "adapters" not in red else ():
        bench.step(name, ("merged",) if "prefixes" in red else ())
    if bench.device == "cuda" and "adapters" not in red:
        for case in ADAPTER_CASES:  # last, since a compiler or a graph that fails may take the process with it
            if case.name in SUITES[suite]:
                bench.late(case)
        bench.judge(ADAPTER_CASES)
    say_kept(out, "docs/kernels.md")
    if red:
        raise ValueError(f"the tests of {red[0]} fail (see above), so nothing of them was timed")


class _Bench:
    """One run: where it is, how fast a copy and a product are there, and the lines so far."""

    def __init__(self, rounds: int, out: str | None):
        import torch

        from hyperpelt_ds import dist

        self.rounds, self.lines = rounds, list[Line]()
        self.device = dist.device().type
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        hardware = torch.cuda.get_device_name() if self.device == "cuda" else f"{platform.machine()} CPU"
        self.about = f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}, {str(self.dtype)[6:]}"
        self._out = Path(out) if out else None
        if self._out:
            self._out.write_text("")
        self.rate, self.peak = ceilings(self.device, self.dtype)
        print(
            f"{self.about}, {rounds} rounds; copy {self.rate / 1e9:.0f} GB/s, "
            f"matrix product {self.peak / 1e9:.0f} GFLOP/s"
        )
        for system, metric, median in (("copy", "bytes_a_second", self.rate), ("product", "flops_a_second", self.peak)):
            self.keep({"case": "ceilings", "system": system, "metric": metric, "median": median})

    def keep(self, line: Line) -> None:
        line["hardware"] = self.about
        self.lines.append(line)
        if self._out:
            with self._out.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def case(self, case: Any, peers: tuple[str, ...]) -> None:
        """A line for every system of a case of adapters or low-rank deltas."""
        from hyperpelt_ds.kernels import plan
        from hyperpelt_ds.kernels.cases import AdapterCase

        if not isinstance(case, AdapterCase):
            print(f"{case.name}: forward only")
            actions = low_rank_systems(case, ("ours", *peers), self.device, self.dtype)
            self.compare(case.name, actions, "ours", metric="forward_s")
            return
        (cost,) = plan(case, dtype=self.dtype, device=self.device, rate=self.rate).costs
        assert cost.floor_s is not None
        print(f"{case.name}: {cost}")
        actions = systems(case, ("ours", *peers), self.device, self.dtype)
        known = {"flops": cost.flops, "bytes": cost.bytes, "floor_s": cost.floor_s}
        wide = case.sites * case.samples * case.tokens * case.size * self.dtype.itemsize

        def more(system: str, line: Line) -> Line:
            if system not in PARTIAL:
                line |= {**known, "of_copy_rate": cost.floor_s / line["median"]}
            if "peak_bytes" in line:
                line["beyond_x_bytes"] = line["peak_bytes"] - wide
            if "chunked" in actions and system in ("ours", "chunked"):
                line["live_bytes"] = _live(actions[system])
            return line

        self.compare(case.name, actions, "ours", more)

    def late(self, case: Any) -> None:
        """What takes long to prepare, beside ours, whose own line is there already."""
        for name, cases in LATE.items():
            if case.name in cases:
                self._late(case, name)

    def _late(self, case: Any, name: str) -> None:
        try:
            actions = systems(case, ("ours", name), self.device, self.dtype)
        except RuntimeError as error:  # a graph that cannot be captured
            self._left_out(case.name, name, error)
        else:
            self.compare(case.name, actions, "ours", keep=(name,))

    def compare(
        self,
        case: str,
        actions: Mapping[str, Callable[[], object]],
        base: str,
        more: Callable[[str, Line], Line] = lambda _, line: line,
        metric: str = "forward_backward_s",
        keep: tuple[str, ...] = (),
    ) -> None:
        """Lines of all systems (or of `keep`), each with its time beside that of `base` in the same round."""
        able = {name: action for name, action in actions.items() if self._runs(case, name, action)}
        if base not in able:
            return
        times = take_turns(able, self.rounds, self.device)
        for system, seconds in times.items():
            if keep and system not in keep:
                continue
            ratios = [own / other for own, other in zip(seconds, times[base], strict=True)]
            line: Line = {"case": case, "system": system, "metric": metric}
            line |= {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
            line |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
            line |= on_gpu(able[system], kernels=system != "loop_example") if self.device == "cuda" else {}
            line = more(system, line)
            self.keep(line)
            print(f"  {_row(line)}", flush=True)

    def step(self, name: str, without: tuple[str, ...]) -> None:
        """Train steps of a whole model, by the useful FLOPs of the frozen model's own."""
        print(f"step {name}")
        actions, flops = kernel_steps.actions(kernel_steps.STEPS[name], self.device, self.dtype)

        def more(_: str, line: Line) -> Line:
            found = {"mfu": flops / line["median"] / self.peak}
            return line | found | ({"gpu_mfu": flops / line["gpu_s"] / self.peak} if line.get("gpu_s") else {})

        self.compare(f"step {name}", {n: a for n, a in actions.items() if n not in without}, "ours", more)

    def judge(self, cases: Any) -> None:
        for verdict in kernel_goals.judged(self.lines, cases, self.rate):
            self.keep(verdict._asdict())
            print(verdict)

    def _runs(self, case: str, system: str, action: Callable[[], object]) -> bool:
        try:
            action()
            if self.device == "cuda":
                import torch

                torch.cuda.synchronize()
        except RuntimeError as error:  # torch's: out of memory, a shape that its kernel does not take
            self._left_out(case, system, error)
            return False
        return True

    def _left_out(self, case: str, system: str, error: RuntimeError) -> None:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        self.keep({"case": case, "system": system, "metric": "left_out", "reason": reason})
        print(f"  {system:16} left out: {reason}", flush=True)


def _row(line: Line) -> str:
    median, low, high = (line[name] * 1e3 for name in ("median", "min", "max"))
    text = f"{line['system']:16} {median:9.2f} ms [{low:.2f}, {high:.2f}]"
    text += f"  x{line['ratio']:.2f} [{line['ratio_min']:.2f}, {line['ratio_max']:.2f}]"
    if "gpu_s" in line:
        text += f"  {line['launches']} kernels {line['gpu_s'] * 1e3:.2f} ms"
    if "peak_bytes" in line:
        text += f"  {line['peak_bytes'] / 1e6:.0f} MB"
    if "of_copy_rate" in line:
        text += f"  {line['of_copy_rate']:.0%} of the copy rate"
    if "live_bytes" in line:
        text += f"  {line['live_bytes'] / 1e6:.0f} MB live"
    if "mfu" in line:
        text += f"  {line['mfu']:.0%} of the product's rate"
    return text


def _red_ops(folder: Path) -> list[str]:
    """The ops of which a test in `folder` fails, those for a GPU included where there is one; all at the same time."""
    import torch

    marks = ("not slow and not gpu", *(["gpu"] if torch.cuda.is_available() else []))
    found = [file for file in sorted(folder.glob("test_kernels*.py")) if file.name != "test_kernels_bench.py"]
    files = {"prefixes": [file for file in found if "prefix" in file.name]}
    files["adapters"] = [file for file in found if file not in files["prefixes"]]
    running = [
        (op, subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-m", mark, *map(str, files[op])],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ))
        for op in OPS for mark in marks if files[op]
    ]  # fmt: skip
    red = set()
    for op, process in running:
        printed, _ = process.communicate()
        if process.returncode not in (0, 5):  # 5: nothing to run
            print(printed[-6000:], file=sys.stderr)
            red.add(op)
    return [op for op in OPS if op in red]


def _live(action: Callable[[], object]) -> int:
    """The most bytes of tensors that a pass makes and holds at a time."""
    from live_bytes import LiveBytes

    with LiveBytes() as live:
        action()
    return live.peak


if __name__ == "__main__":
    run(bench_kernels)
