"""A run on one screen of a terminal: its state, how far it is, what went wrong, and what to do next.

This file must not judge anything by itself; state.py does.
"""

from __future__ import annotations

import math
from collections import Counter

from hyperpelt_ds.report import state
from hyperpelt_ds.report.files import RunFiles
from hyperpelt_ds.report.html import duration, moment, number

_BAR = 30


def text(run: RunFiles) -> str:
    """Some lines, the first one the folder and the state. Facts that the run has no file for are left out."""
    judged = state.judge(run)
    facts = {
        "progress": _progress(run),
        "loss": _loss(run),
        "validation": _validation(run),
        "checkpoint": _checkpoint(run),
        "speed": _speed(run),
        "holes": _holes(run),
        "bad steps": _bad_steps(run),
        "stacks": ", ".join(f"{name}: {_first(stack)}" for name, stack in run.stacks.items()) or None,
        "next": judged.next,
    }
    width = max(map(len, facts))
    head = f"{run.folder}: {judged.word}; {judged.said}"
    return "\n".join([head, *(f"  {name.ljust(width)}  {said}" for name, said in facts.items() if said)])


def _progress(run: RunFiles) -> str | None:
    steps = run.setting("train.steps")
    if not steps:
        return f"step {number(run.step)}" if run.step else None
    done = min(1.0, run.step / steps)
    bar = "#" * round(done * _BAR)
    return f"[{bar.ljust(_BAR, '.')}] step {number(run.step)} of {number(steps)}, {math.floor(100 * done)} %"


def _loss(run: RunFiles) -> str | None:
    """The newest value, and one a tenth of the way back."""
    points = run.series("train/loss")
    if not points:
        return None
    step, value = points[-1]
    before = points[-1 - max(1, len(points) // 10)] if len(points) > 1 else None
    return f"{number(value)} at step {step}" + (f", {number(before[1])} at step {before[0]}" if before else "")


def _validation(run: RunFiles) -> str | None:
    points = run.series("eval/mean")
    if not points:
        return None
    step, value = points[-1]
    best = f", best {number(run.best['score'])} at step {run.best['step']}" if run.best else ""
    return f"mean {number(value)} at step {step}{best}"


def _checkpoint(run: RunFiles) -> str | None:
    if run.checkpoint is None:
        return "none yet" if run.config else None
    progress = run.checkpoint.state["progress"]
    return f"{run.checkpoint.name}, {moment(run.checkpoint.time)}, after {duration(progress['seconds'])} of training"


def _speed(run: RunFiles) -> str | None:
    rate, memory = run.last("perf/samples_per_second"), run.last("perf/memory_gib")
    if rate is None or memory is None:
        return None
    waiting = run.last("data/wait_fraction") or 0.0
    return f"{number(rate, 3)} samples/s, {memory:.2f} GiB at most, {waiting:.0%} of the time waiting for data"


def _holes(run: RunFiles) -> str | None:
    if not run.holes:
        return None
    shard, count = Counter(hole["shard"] for hole in run.holes).most_common(1)[0]
    last = run.holes[-1]
    return f"{number(len(run.holes))}, {number(count)} of them in {shard}; the last: {last['key']!r}, {last['reason']}"


def _bad_steps(run: RunFiles) -> str | None:
    if not run.bad_steps:
        return None
    last = run.bad_steps[-1]
    back = f"; went back at step {run.rollback['from_step']}" if run.rollback else ""
    return f"{number(len(run.bad_steps))}, the last {last['step']}: {last['reason']}{back}"


def _first(stack: str) -> str:
    """The line in which the watchdog says why, without the rank, the machine and the time before it."""
    return stack.partition("\n")[0].rpartition(": ")[2]
