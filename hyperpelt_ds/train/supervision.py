"""Keeps a run going: starts its command again and again until it is done, cannot be helped, or makes no progress.

It knows of the run what is on disk (STATUS.json, LATEST, the processes that the ranks recorded) and its own child.
Nothing is ever ended by name: only the child's process group, and recorded processes that still are the same ones.
A supervisor ends those of its own machine, and a new start on every machine those that an earlier one left there.
Standard library only; it must not know DeepSpeed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from hyperpelt_ds.train import outcome

PROCESSES = "processes"

# Data, numerics and differing ranks need a human; 2 is what a command says of a wrong request.
_FINAL = {outcome.DataFault.code, outcome.NotFinite.code, outcome.Diverged.code}
_REFUSED = 2
_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_LONGEST_WAIT = 300.0
_TAKE_OVER_SECONDS = 60.0
"""A start that is taken over has so long for its step and a checkpoint."""


def record_process(run_dir: Path, rank: int) -> None:
    """Writes run_dir/processes/rank_R.json: where this process can be found, and when it began, which no later process
    of the same number has in common with it."""
    folder = run_dir / PROCESSES
    folder.mkdir(parents=True, exist_ok=True)
    process = {"host": socket.gethostname(), "pid": os.getpid(), "start": began(os.getpid())}
    partial = folder / f"rank_{rank}.partial"
    partial.write_text(json.dumps(process) + "\n")
    os.replace(partial, folder / f"rank_{rank}.json")


def take_over(run_dir: Path, say: Callable[[str], None]) -> None:
    """Ends what an earlier start of the run left on this machine: a process of it that still trains saves and leaves,
    with all others of that start on whatever machine; one that hangs is killed. For one process a machine."""

    def left() -> list[int]:
        return [process for process in running_here(run_dir) if process != os.getpid()]

    for number, seconds in ((signal.SIGTERM, _TAKE_OVER_SECONDS), (signal.SIGKILL, 5.0)):
        for process in left():
            say(f"{number.name} to process {process}, which an earlier start of {run_dir} left on this machine")
            _signal(process, number)
        _wait_until(lambda: not left(), seconds)


def running_here(run_dir: Path) -> list[int]:
    """The recorded processes of this machine that are still running, by number."""
    found = []
    for file in sorted((run_dir / PROCESSES).glob("rank_*.json")):
        process = json.loads(file.read_text())
        if process["host"] == socket.gethostname() and began(process["pid"]) == process["start"]:
            found.append(process["pid"])
    return found


def _signal(process: int, number: signal.Signals) -> None:
    """To a process that may have ended since it was seen."""
    with suppress(ProcessLookupError):
        os.kill(process, number)


class Supervisor:
    """Runs `command`, which trains in `run_dir`."""

    def __init__(
        self, command: Sequence[str], run_dir: Path, cycles: int, wait: float, grace: float, say: Callable[[str], None]
    ):
        """`cycles` without a newer checkpoint end it. `wait` seconds, doubled for each such cycle, come before the next
        start. A run that was asked to stop has `grace` seconds for it."""
        self.command = [*command] if "--resume" in command else [*command, "--resume"]
        self.run_dir, self.cycles, self.wait, self.grace, self.say = run_dir, cycles, wait, grace, say
        self._asked = False

    def run(self) -> int:
        """The exit code of the last cycle: 0 if the run is done, else as outcome.py lists them."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_SIGNALS, signal.SIGCHLD})  # they are waited for instead
        try:
            return self._run(before)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _run(self, mask: set[int | signal.Signals]) -> int:
        reached, idle = self._saved(), 0
        while True:
            code = self._cycle(mask)
            saved = self._saved()
            idle = 0 if saved > reached else idle + 1
            reached = max(reached, saved)
            if code == 0 or self._asked or code in _FINAL or code == _REFUSED:
                return code
            if idle >= self.cycles:
                self.say(f"{idle} cycles without a newer checkpoint than that of step {reached}: giving up")
                return code
            pause = min(self.wait * 2**idle, _LONGEST_WAIT)
            self.say(f"exit code {code}, checkpoint of step {reached}; next start in {pause:.0f} s")
            if signal.sigtimedwait(_SIGNALS, pause) is not None:
                return outcome.Preempted.code

    def _cycle(self, mask: set[int | signal.Signals]) -> int:
        (self.run_dir / outcome.STATUS).unlink(missing_ok=True)
        child = subprocess.Popen(
            self.command,
            start_new_session=True,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, mask),  # else it would inherit the block
        )
        self.say(f"started {child.pid}: {' '.join(self.command)}")
        end = float("inf")
        while not _ended(child) and time.monotonic() < end:
            got = signal.sigtimedwait({*_SIGNALS, signal.SIGCHLD}, 1.0)
            if got is not None and got.si_signo in _SIGNALS and not self._asked:
                self._asked, end = True, time.monotonic() + self.grace
                self._ask(child)
            elif end == float("inf") and self._told() is not None:  # a launcher may wait for a lost machine for ever
                end = time.monotonic() + self.grace
        self._clear(child)
        return self._code(child.wait())

    def _ask(self, child: subprocess.Popen[bytes]) -> None:
        """A signal to one rank stops all, and lets the launcher see them end; before there is one, all are to go."""
        ranks = running_here(self.run_dir)
        if ranks:
            self.say(f"asking the run to stop (process {ranks[0]})")
            _signal(ranks[0], signal.SIGTERM)
        else:
            os.killpg(child.pid, signal.SIGTERM)

    def _clear(self, child: subprocess.Popen[bytes]) -> None:
        """Ends what is left of a cycle on this machine, having asked it to stop if its launcher is gone: it may still
        train. The child is not yet reaped, so that its group is still its."""
        if _ended(child):
            for process in running_here(self.run_dir):
                self.say(f"asking process {process} to stop, which its launcher left")
                _signal(process, signal.SIGTERM)
            _wait_until(lambda: not running_here(self.run_dir), self.grace)
        for process in running_here(self.run_dir):
            self.say(f"ending process {process}, which is left")
            _signal(process, signal.SIGKILL)
        os.killpg(child.pid, signal.SIGKILL)

    def _saved(self) -> int:
        """The step of the newest checkpoint, -1 if there is none."""
        file = self.run_dir / "LATEST"
        return int(file.read_text().strip().rpartition("_")[2]) if file.is_file() else -1

    def _code(self, returned: int) -> int:
        """What STATUS.json says, since launchers change codes and may even turn a death into 0."""
        told = self._told()
        if told is not None:
            return told
        if self._asked:
            return outcome.Preempted.code
        return returned if returned > 0 else 1

    def _told(self) -> int | None:
        """The exit code in STATUS.json, where rank 0 says how it ended; None before."""
        status = outcome.read_status(self.run_dir)
        return None if status is None or status["code"] is None else int(status["code"])


def _wait_until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.2)


def _ended(child: subprocess.Popen[bytes]) -> bool:
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def began(process: int) -> int | None:
    """When a process began, in ticks since the machine did; None if it is no more, or only waits to be reaped."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])
