"""What all ranks decide together between two steps: to stop, to skip, to go back.

A rank that acted on its own would leave the others waiting for it. This file must not know the model, the engine, or
what is in a batch.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from hyperpelt_ds import dist, lines
from hyperpelt_ds.train import outcome
from hyperpelt_ds.train.outcome import NotFinite

BAD_STEPS = "bad_steps.jsonl"
ROLLBACK = "rollback.json"

_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1

log = dist.logger(__name__)


class Word(NamedTuple):
    """What the ranks told each other: usable samples of the global batch, whether to stop, whether data is missing."""

    usable: int
    stop: bool
    fault: bool


class Control:
    """While it is entered, SIGTERM, SIGINT and SIGUSR1 only ask the run to stop; a second SIGINT interrupts as ever.

    To be entered in the main thread.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Control:
        self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def poll(self, usable: int = 0, fault: bool = False) -> Word:
        """The same answer on every rank, which all call it together: a signal to any of them stops all.

        The numbers cross on the host, so no device is waited for: one round trip a step.
        """
        samples, stop, faults = dist.host_sum([usable, self._asked, fault])
        return Word(samples, stop > 0, faults > 0)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)


class RollBack(Exception):
    """All ranks are to go back to the newest checkpoint, once."""


class BadSteps:
    """Steps that changed no weight, a line each in run_dir/bad_steps.jsonl, and when there were too many in a row.

    The first time that happens the run goes back to a checkpoint (run_dir/rollback.json says so), and the samples of
    those steps, and of as many before them, are left out from then on: the same samples from the same weights would
    lead to the same place. The second time ends it.
    """

    def __init__(self, run_dir: Path, step: int, limit: int):
        """For a run that goes on from `step`; every rank calls it."""
        self._folder, self._limit = run_dir, limit
        self.in_a_row = 0
        """Steps that were not finite since the last one that was applied."""
        self._lines = run_dir / BAD_STEPS
        found: tuple[int, tuple[int, int] | None] = 0, None
        if dist.rank() == 0:
            lines.drop_after(self._lines, step)
            count = len(self._lines.read_text().splitlines()) if self._lines.is_file() else 0
            rollback = run_dir / ROLLBACK
            found = count, tuple(json.loads(rollback.read_text())["samples"]) if rollback.is_file() else None
        self.count, self._left_out = dist.gather(found)[0]

    def leaves_out(self, samples: int) -> bool:
        """Whether the step that begins with this sample of the run is not to be trained on."""
        return self._left_out is not None and self._left_out[0] <= samples < self._left_out[1]

    def good(self) -> None:
        """A step was applied."""
        self.in_a_row = 0

    def add(self, step: int, samples: tuple[int, int], reason: str, culprits: Sequence[str] = ()) -> None:
        """A step over the run's samples [first, end) that changed nothing.

        `culprits` names those whose loss was not finite: the bad ones, and others of their micro-batches.
        """
        self.count += 1
        if dist.rank() == 0:
            with self._lines.open("a") as file:
                file.write(
                    json.dumps({"step": step, "samples": samples, "reason": reason, "culprits": list(culprits)}) + "\n"
                )
        named = f", for example of {culprits[0]}" if culprits else ""
        log.warning("step %d changed no weight: %s%s (%d so far)", step, reason, named, self.count)

    def judge(self, step: int, samples: tuple[int, int], checkpoint: bool) -> None:
        """After `add` of a step that was not finite: raises RollBack or NotFinite if it is one too many in a row.

        Every rank calls it. `checkpoint`: whether there is one to go back to.
        """
        self.in_a_row += 1
        if self.in_a_row < self._limit:
            return
        text = f"{self.in_a_row} steps in a row up to step {step} were not finite (train.max_consecutive_skips)"
        if self._left_out is not None:
            raise NotFinite(f"{text}, again after going back once; {self._lines} lists them")
        if not checkpoint:
            raise NotFinite(f"{text}, and there is no checkpoint to go back to; {self._lines} lists them")
        size = samples[1] - samples[0]
        left_out = max(0, samples[1] - 2 * self.in_a_row * size), samples[1]
        if dist.rank() == 0:
            why = lines.newest(self._lines, self.in_a_row)  # those lines go, with the steps that are taken again
            outcome.write_small(self._folder / ROLLBACK, {"from_step": step, "samples": left_out, "bad_steps": why})
        dist.barrier()
        log.warning("%s: going back, samples %d to %d of the run are left out", text, left_out[0], left_out[1] - 1)
        raise RollBack
