"""How a run stands and what to do next, judged from its files and from the processes that this machine can see.

It must not know how to draw, nor change anything.
"""

from __future__ import annotations

import shlex
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from hyperpelt_ds.report.files import RunFiles
from hyperpelt_ds.report.html import duration
from hyperpelt_ds.train import outcome
from hyperpelt_ds.train.supervision import PROCESSES, running_here

ENDED = "ended"
"""It says it is running, and none of its processes is left."""
UNKNOWN = "unknown"
_PACE = 10
"""Log lines that the pace is taken from."""


@dataclass(frozen=True)
class State:
    """`word` is a state of outcome.py, `ended` or `unknown`; `said` explains it, `next` is what to do about it."""

    word: str
    said: str
    next: str


def judge(run: RunFiles) -> State:
    """The state of a run on this machine, now."""
    status = run.status
    if status is None:
        if run.done:
            return State(outcome.FINISHED, "there is DONE", _after(run))
        what = "it did not get to its first step, or is being started" if not run.lines else "only its figures are here"
        return State(UNKNOWN, f"no {outcome.STATUS}: {what}", _look(run))
    word, ago = status["state"], duration(max(0.0, time.time() - status["time"]))
    if word == outcome.RUNNING:
        return _running(run, ago)
    when = f"{ago} ago" + (f", exit code {status['code']}" if status["code"] else "")
    said = {
        outcome.FINISHED: "done",
        outcome.FAILED: "an error ended it; what it printed last says which",
        outcome.HUNG: "no progress within a limit; " + (f"{', '.join(run.stacks)} say where" if run.stacks else ""),
        outcome.Preempted.state: "stopped by a signal, everything saved",
        outcome.DataFault.state: "data could not be read, or too much of it could not be used",
        outcome.NotFinite.state: "too many steps in a row were not finite; bad_steps.jsonl lists them",
        outcome.Diverged.state: "its ranks held different weights; a bug or a bad machine",
    }.get(word, "a state that this version does not know")
    do = {
        outcome.FINISHED: _after(run),
        outcome.DataFault.state: f"python data_prep/verify.py {run.setting('data.manifest') or 'MANIFEST'}, then "
        f"{resume(run)}",
        outcome.NotFinite.state: "look at the samples in bad_steps.jsonl; a lower train.learning_rate is another run",
        outcome.Diverged.state: f"look at the machine that its last message names, then {resume(run)}",
    }.get(word, resume(run))
    return State(word, f"{said}; {when}", do)


def resume(run: RunFiles) -> str:
    """The command that goes on, as far as environment.json tells how the run was started."""
    if run.setting("data.plain"):
        return "it cannot be resumed (data.plain): start again in a new run_dir"
    words = [str(word) for word in run.environment.get("command", [])]
    if not words:
        return "give its command again, with --resume"
    world = run.environment["world_size"]
    launched = any(word.startswith(("--local_rank", "--local-rank")) for word in words)
    own = [word for word in words if not word.startswith(("--local_rank=", "--local-rank="))]
    command = shlex.join(own if "--resume" in own else [*own, "--resume"])
    if world == 1 and not launched:
        return f"python {command}"
    if len(hosts(run.folder)) > 1:
        return f"start it as before on all machines: {command}"
    flag = "deepspeed --num_accelerators" if launched else "torchrun --nproc_per_node"
    return f"{flag} {world} {command}"


def remaining(run: RunFiles) -> float | None:
    """Seconds until the last step at the pace of the newest log lines; None if they do not tell."""
    lines = [line for line in run.lines if "train/learning_rate" in line][-_PACE:]
    steps = run.setting("train.steps")
    if len(lines) < 2 or not steps or lines[-1]["step"] == lines[0]["step"]:
        return None
    pace = (lines[-1]["time"] - lines[0]["time"]) / (lines[-1]["step"] - lines[0]["step"])
    return max(0.0, pace * (steps - lines[-1]["step"]))


def hosts(run_dir: Path) -> set[str]:
    """The machines that the run's processes were recorded on."""
    found = map(outcome.read_small, run_dir.glob(f"{PROCESSES}/rank_*.json"))
    return {process["host"] for process in found if process is not None}


def _running(run: RunFiles, ago: str) -> State:
    here, machines = running_here(run.folder), hosts(run.folder)
    away = sorted(machines - {socket.gethostname()})
    if here:
        left = remaining(run)
        processes = f"process{'es' if len(here) > 1 else ''} {', '.join(map(str, here))}"
        eta = f", about {duration(left)} left" if left is not None else ""
        return State(outcome.RUNNING, f"{processes}; last word {ago} ago{eta}", "wait")
    if away:
        where = ", ".join(away)
        return State(UNKNOWN, f"it says running, {ago} ago, on {where}", f"look there; if it is gone: {resume(run)}")
    said = f"it was running {ago} ago and none of its processes is left: killed, or the machine was"
    return State(ENDED, said, resume(run))


def _after(run: RunFiles) -> str:
    return (
        f"python launch/{'evaluate' if run.results is None else 'report'}.py --run_dir {shlex.quote(str(run.folder))}"
    )


def _look(run: RunFiles) -> str:
    return resume(run) if run.environment else "look at what its command printed"
