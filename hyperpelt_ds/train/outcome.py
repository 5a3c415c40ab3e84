"""How a run ends: its exit codes, the exceptions that carry them, and STATUS.json and DONE, which tell other programs.

    0 done (and a file DONE)   65 data   66 numerics   67 ranks differ   70 hang   75 stopped, go on with --resume

Standard library only: entry points and the supervisor read this without loading torch. It must not know what a step is.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any, ClassVar

STATUS = "STATUS.json"
DONE = "DONE"

RUNNING, FINISHED, FAILED, HUNG = "running", "finished", "failed", "hung"
HUNG_CODE = 70


class Stopped(Exception):
    """A run that all ranks left together before its last step; the process is to exit with `code`."""

    code: ClassVar[int]
    state: ClassVar[str]
    saves: ClassVar[bool] = False
    """Whether what was reached is worth a checkpoint before leaving."""


class Preempted(Stopped):
    """A signal to any rank asked for it."""

    code, state, saves = 75, "preempted", True


class DataFault(Stopped):
    """Data that cannot be read, or too much that cannot be used."""

    code, state, saves = 65, "data", True


class NotFinite(Stopped):
    """Losses or gradients that were not finite too many times in a row."""

    code, state = 66, "numerics"


class Diverged(Stopped):
    """Ranks whose weights or gradients are not the same."""

    code, state = 67, "diverged"


def write_status(run_dir: Path, state: str, step: int, code: int | None = None) -> None:
    """Replaces run_dir/STATUS.json; for rank 0 only."""
    status = {"state": state, "step": step, "code": code, "time": time.time()}
    status |= {"pid": os.getpid(), "host": socket.gethostname()}
    partial = run_dir / f"{STATUS}.{os.getpid()}"
    partial.write_text(json.dumps(status) + "\n")
    os.replace(partial, run_dir / STATUS)


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """What `write_status` wrote last: state, step, code, time, pid, host; None if there is nothing."""
    file = run_dir / STATUS
    status: dict[str, Any] | None = json.loads(file.read_text()) if file.is_file() else None
    return status
