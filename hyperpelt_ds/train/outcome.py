"""How a run ends: its exit codes, the exceptions that carry them, and STATUS.json and DONE, which tell other programs.

    0 done (and a file DONE)   65 data   66 numerics   67 ranks differ   70 hang   75 stopped, go on with --resume

Standard library only: entry points and the supervisor read this without loading torch. It must not know what a step is.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

STATUS = "STATUS.json"
DONE = "DONE"
START, TAKEN = "START.json", "TAKEN.json"
"""The name that a supervisor gives the start that it begins, and the name of a start that ended another one."""

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


def begin(run_dir: Path) -> bool:
    """Names this start of the run, by what a supervisor left in run_dir/START, if it did, else by chance; whether it
    did. Every rank calls it. Two starts may be there at once, the second ending the first, and what one says is not
    the other's word."""
    given = read_small(run_dir / START)
    _start["name"] = str(given["start"]) if given else uuid.uuid4().hex
    return given is not None


def start_name() -> str:
    """That of this process's start; "" before `begin`."""
    return _start.get("name", "")


_start: dict[str, str] = {}


def write_status(run_dir: Path, state: str, step: int, code: int | None = None) -> None:
    """Replaces run_dir/STATUS.json; for rank 0 only."""
    status = {"state": state, "step": step, "code": code, "time": time.time()}
    status |= {"pid": os.getpid(), "host": socket.gethostname(), "start": start_name()}
    write_small(run_dir / STATUS, status)


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """What `write_status` wrote last: state, step, code, time, pid, host, start; None if there is nothing, or nothing
    that can be read."""
    return read_small(run_dir / STATUS)


def write_small(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces a file; also a machine that loses its power leaves the old one or the new one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with partial.open("w") as file:
        file.write(json.dumps(content) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_small(path: Path) -> dict[str, Any] | None:
    """A small file's content; None if it is not there or, on a file server in trouble, cannot be read just now."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
