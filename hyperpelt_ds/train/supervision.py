"""Keeps a run going: starts its command again and again until it is done, cannot be helped, or makes no progress.

It knows of the run what is on disk (STATUS.json, LATEST, the processes that the ranks recorded) and its own child.
Nothing is ever ended by name: only the child's process group, and recorded processes that still are the same ones.
A supervisor ends those of its own machine, and a new start on every machine those that an earlier one left there.
Standard library only; it must not know DeepSpeed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from hyperpelt_ds.train import outcome

PROCESSES = "processes"

# Data, numerics and differing ranks need a human; 2 is what a command says of a wrong request.
_FINAL = {outcome.DataFault.code, outcome.NotFinite.code, outcome.Diverged.code}
_REFUSED = 2
_LONGEST_WAIT = 300.0
_TAKE_OVER_SECONDS = 300.0
"""A start that is taken over has so long for its step and a checkpoint."""
_LAUNCHER_SECONDS = 10.0
"""A launcher has so long to end what it started on other machines."""
_LAST_SECONDS = 600.0
"""A run that is done has so long to end: its monitors may have to send what they hold."""


def record_process(run_dir: Path, rank: int) -> None:
    """Writes run_dir/processes/rank_R.json: where this process can be found, and when it began, which no later process
    of the same number has in common with it."""
    folder = run_dir / PROCESSES
    folder.mkdir(parents=True, exist_ok=True)
    process = {"host": socket.gethostname(), "pid": os.getpid(), "start": began(os.getpid())}
    outcome.write_small(folder / f"rank_{rank}.json", process)


def forget_processes(run_dir: Path, ranks: int) -> None:
    """Removes the records of ranks that an earlier start had and one of so many `ranks` does not."""
    for file in (run_dir / PROCESSES).glob("rank_*.json"):
        if int(file.stem.removeprefix("rank_")) >= ranks:
            file.unlink(missing_ok=True)


def take_over(run_dir: Path, say: Callable[[str], None]) -> None:
    """Ends what an earlier start of the run left on this machine: a process of it that still trains saves and leaves,
    with all others of that start on whatever machine; one that hangs is killed. For one process a machine."""

    def left() -> list[int]:
        return [process for process in running_here(run_dir) if process != os.getpid()]

    if left():  # for whoever supervises that start
        outcome.write_small(run_dir / outcome.TAKEN, {"start": outcome.start_name(), "host": socket.gethostname()})
    for number, seconds in ((signal.SIGTERM, _TAKE_OVER_SECONDS), (signal.SIGKILL, 5.0)):
        for process in left():
            say(f"{number.name} to process {process}, which an earlier start of {run_dir} left on this machine")
            _signal(process, number)
        _wait_until(lambda: not left(), seconds)


def running_here(run_dir: Path) -> list[int]:
    """The recorded processes of this machine that are still running, by number."""
    found = []
    for file in sorted((run_dir / PROCESSES).glob("rank_*.json")):
        process = outcome.read_small(file)
        if process is None:
            continue
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
        self.run_dir, self.cycles, self.wait, self.grace, self._say = run_dir, cycles, wait, grace, say
        self._asked = False
        self._start = ""
        """The name of the start that this cycle began."""
        hung_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN  # else nohup wants it to go on
        self._signals = {signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hung_up else [])}

    def say(self, text: str) -> None:
        """To whoever still listens."""
        with suppress(OSError):
            self._say(text)

    def run(self) -> int:
        """The exit code of the last cycle: 0 if the run is done, else as outcome.py lists them."""
        before = signal.pthread_sigmask(
            signal.SIG_BLOCK, {*self._signals, signal.SIGCHLD}
        )  # they are waited for instead
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
            if self._is_taken():
                self.say("another start took the run over; leaving it to that one")
                return code
            if idle >= self.cycles:
                self.say(f"{idle} cycles without a newer checkpoint than that of step {reached}: giving up")
                return code
            pause = min(self.wait * 2**idle, _LONGEST_WAIT)
            self.say(f"exit code {code}, checkpoint of step {reached}; next start in {pause:.0f} s")
            if signal.sigtimedwait(self._signals, pause) is not None:
                return outcome.Preempted.code

    def _cycle(self, mask: set[int | signal.Signals]) -> int:
        for name in (outcome.STATUS, outcome.TAKEN):
            (self.run_dir / name).unlink(missing_ok=True)
        self._start = uuid.uuid4().hex
        self.run_dir.mkdir(parents=True, exist_ok=True)
        outcome.write_small(self.run_dir / outcome.START, {"start": self._start})
        child = subprocess.Popen(
            self.command,
            start_new_session=True,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, mask),  # else it would inherit the block
        )
        self.say(f"started {child.pid}: {' '.join(self.command)}")
        try:
            self._watch(child)
        except BaseException:  # the run must not go on with nobody to look after it
            self._ask(child)
            _wait_until(lambda: _ended(child), self.grace)
            raise
        finally:
            self._clear(child)
            if (outcome.read_small(self.run_dir / outcome.START) or {}).get("start") == self._start:
                (self.run_dir / outcome.START).unlink(missing_ok=True)
        return self._code(child.wait())

    def _watch(self, child: subprocess.Popen[bytes]) -> None:
        """Returns when the child has ended, or should have."""
        end = float("inf")
        while not _ended(child) and time.monotonic() < end:
            got = signal.sigtimedwait({*self._signals, signal.SIGCHLD}, 1.0)
            if got is not None and got.si_signo in self._signals and not self._asked:
                self._asked, end = True, time.monotonic() + self.grace
                self._ask(child)
            elif end == float("inf") and (told := self._told()) is not None:
                # a launcher may wait for a lost machine for ever
                end = time.monotonic() + (self.grace if told else max(self.grace, _LAST_SECONDS))

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
        train. The child is not yet reaped, so that its group is still its. A start that took the run over has ended it
        already, and what is running now is that one's."""
        if self._is_taken():
            os.killpg(child.pid, signal.SIGKILL)
            return
        if _ended(child):
            for process in running_here(self.run_dir):
                self.say(f"asking process {process} to stop, which its launcher left")
                _signal(process, signal.SIGTERM)
            _wait_until(lambda: not running_here(self.run_dir), self.grace)
        for process in running_here(self.run_dir):
            self.say(f"ending process {process}, which is left")
            _signal(process, signal.SIGKILL)
        if not _ended(child):  # srun and pdsh end what runs elsewhere, given the time
            os.killpg(child.pid, signal.SIGTERM)
            _wait_until(lambda: _ended(child), _LAUNCHER_SECONDS)
        os.killpg(child.pid, signal.SIGKILL)

    def _saved(self) -> int:
        """The step of the newest checkpoint, -1 if there is none."""
        try:
            return int((self.run_dir / "LATEST").read_text().strip().rpartition("_")[2])
        except (OSError, ValueError):
            return -1

    def _code(self, returned: int) -> int:
        """What STATUS.json says, since launchers change codes and may even turn a death into 0."""
        told = self._told()
        if told is not None:
            return told
        if self._asked:
            status = outcome.read_status(self.run_dir)
            if status is not None:
                reached = self._saved()
                self.say(
                    f"the run did not save within {self.grace:.0f} s (--grace); after the checkpoint of step {reached} "
                    f"all is lost"
                )
            return outcome.Preempted.code
        return returned if returned > 0 else 1

    def _told(self) -> int | None:
        """The exit code in STATUS.json, where this start's rank 0 says how it ended; None before."""
        status = outcome.read_status(self.run_dir)
        return None if status is None or status["start"] != self._start else status["code"]

    def _is_taken(self) -> bool:
        """Whether a start that is not this cycle's has ended it, to go on itself."""
        taken = outcome.read_small(self.run_dir / outcome.TAKEN)
        return taken is not None and taken["start"] != self._start


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
