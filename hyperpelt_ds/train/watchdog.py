"""Ends a process that makes no more progress, after writing down where each of its threads stands; asks one whose
launcher is gone to stop.

A thread of its own, so that it works while the main thread waits in a collective that never ends. It must not know
what the main thread does, only the name of the phase it is in.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType

from hyperpelt_ds import dist
from hyperpelt_ds.config import TrainConfig
from hyperpelt_ds.train import outcome

START, STEP, SAVE, EVALUATION = "start", "step", "save", "evaluation"
_SLOWEST = 20
"""A step may take so many times the median of the last ones, if that is more than its limit."""
_TELL_SECONDS = 30.0
"""So long may writing to the run's folder take."""
_GRACE = 5.0
"""Seconds between writing and ending: ranks hang together, and the end of one would hide where the others stand."""


class Watchdog:
    """From entering it until leaving it, some call of `enter` or `step` must come within each phase's limit.

    Otherwise: run_dir/stack_R.txt, STATUS.json (rank 0), and the process ends with exit code 70. The limits are seconds
    (train.start_limit and its siblings); 0 is none. The first step counts as starting: much is compiled in it.

    A rank, if there are several, whose parent, its launcher, is gone gets a SIGTERM: nobody else would end it.
    """

    def __init__(self, run_dir: Path, limits: TrainConfig):
        self._folder = run_dir
        self._limits = {
            START: limits.start_limit,
            STEP: limits.step_limit,
            SAVE: limits.save_limit,
            EVALUATION: limits.eval_limit,
        }
        self._at = START, time.monotonic()  # one object, since two threads use it
        self._number = 0
        self._launcher = os.getppid() if dist.world_size() > 1 else None  # one alone may outlive its shell
        self._durations: deque[float] = deque(maxlen=50)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()

    def enter(self, phase: str) -> None:
        """The main thread is now in `phase`, or still in it and getting on."""
        self._at = phase, time.monotonic()

    def step(self, number: int) -> None:
        """The main thread begins step `number`."""
        phase, since = self._at
        if self._number and phase in (START, STEP):
            self._durations.append(time.monotonic() - since)
        self.enter(STEP if self._number else START)
        self._number = number

    def limit(self, phase: str) -> float:
        """Seconds that a phase may take; 0 for any number."""
        limit = self._limits[phase]
        if phase == STEP and limit and self._durations:
            return max(limit, _SLOWEST * statistics.median(tuple(self._durations)))
        return limit

    def _watch(self) -> None:
        limits = [limit for limit in self._limits.values() if limit]
        while not self._left.wait(min([1.0, *(limit / 4 for limit in limits)])):
            self._look_for_launcher()
            phase, since = self._at
            limit, waited = self.limit(phase), time.monotonic() - since
            if limit and waited > limit:
                self._end(f"no progress for {waited:.0f} s in phase {phase!r}, step {self._number}")

    def _look_for_launcher(self) -> None:
        if self._launcher is not None and os.getppid() != self._launcher:
            gone, self._launcher = self._launcher, None
            os.kill(os.getpid(), signal.SIGTERM)
            with contextlib.suppress(OSError):  # it may have been what reads this
                print(f"rank {dist.rank()}: its launcher, process {gone}, is gone", file=sys.stderr, flush=True)

    def _end(self, reason: str) -> None:
        try:  # in a thread, since a file server that does not answer may be why nothing moves
            teller = threading.Thread(target=self._tell, args=(reason,), daemon=True)
            teller.start()
            teller.join(_TELL_SECONDS)
            if teller.is_alive():
                faulthandler.dump_traceback(sys.stderr)
            time.sleep(_GRACE)
        finally:  # also if the disk is full, or nobody is left to read what is printed
            os._exit(outcome.HUNG_CODE)

    def _tell(self, reason: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"stack_{dist.rank()}.txt"
        with file.open("w") as stacks:
            stacks.write(f"rank {dist.rank()}, {socket.gethostname()}, pid {os.getpid()}, {time.ctime()}: {reason}\n\n")
            stacks.flush()
            faulthandler.dump_traceback(stacks)
        if dist.rank() == 0:
            outcome.write_status(self._folder, outcome.HUNG, self._number, outcome.HUNG_CODE)
        print(f"error (rank {dist.rank()}): {reason}; {file} says where", file=sys.stderr, flush=True)
