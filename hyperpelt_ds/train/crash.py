"""What ranks say when one of them ends on an error that nobody expected: its cause, once.

The others then fail in whatever they waited for it in, and their traces would bury the one that matters. So every rank
writes its own to a file, and one of them speaks: the first to make the file CAUSE. Standard library only, since also a
library that cannot be loaded is such an error. It must not know what a run is.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType

from hyperpelt_ds.train import supervision

CAUSE = "CAUSE"

_PATIENCE = 15.0
"""Seconds that a rank that lost a peer waits for its word: a network's file system may be so slow to show a file."""
_SPREAD = 120.0
"""Seconds within which all ranks of a start begin."""
_TALK = "/torch/distributed/", "/deepspeed/comm/"
_WRAPPERS = "/fire/", "/launch/command.py"


def speak_once(folder: Path) -> None:
    """From now on an exception that nothing catches is reported as above, in `folder`, which all ranks share.

    A process that is alone keeps Python's own way.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        rank, began, failed = int(os.environ["RANK"]), _first_began(), threading.Event()

        def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            if not isinstance(error, KeyboardInterrupt):
                failed.set()
            _report(folder, rank, began, error, trace)

        atexit.register(_leave, failed)  # registered first, it is called last
        sys.excepthook = report


def _leave(failed: threading.Event) -> None:
    """Past the interpreter's own end, where a thread of gloo may abort a rank (see dist.leave): code 1 is to stay."""
    if failed.is_set():
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(1)


def left(file: Path) -> bool:
    """Whether this module wrote the file."""
    return file.name == CAUSE or file.match("trace_*.txt")


def _report(folder: Path, rank: int, began: float, error: BaseException, trace: TracebackType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher may end this process while it waits
    if isinstance(error, KeyboardInterrupt):  # every rank gets it from the terminal
        if rank == 0:
            print("interrupted", file=sys.stderr, flush=True)
        return
    own = "".join(traceback.format_exception(type(error), error, trace))
    summary = f"rank {rank} on {socket.gethostname()}: {own.rstrip().splitlines()[-1]}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"trace_{rank}.txt"
    file.write_text(f"{summary}\n\n{own}")
    began += file.stat().st_mtime - time.time()  # to the clock of the file server, which says when CAUSE was made
    lost = _lost_a_peer(trace)
    if (lost and _word_of_another(folder / CAUSE, began)) or not _claim(folder / CAUSE, summary, began):
        return
    shown = "".join(traceback.format_exception(type(error), error, _without_wrappers(trace)))
    why = "; another rank is gone and left no word: was it killed, for example for its memory?" if lost else ""
    print(f"{shown}\nerror: {summary}{why}\nfull trace: {file}", file=sys.stderr, flush=True)


def _first_began() -> float:
    """The earliest time, in seconds since the epoch, at which another rank of this start may have begun, and failed.

    Not before their launcher did, which a machine's ranks have in common, but for torchrun when it starts them again.
    """
    now = time.time()
    launcher = supervision.began(os.getppid())
    if launcher is None or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        return now
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - launcher / os.sysconf("SC_CLK_TCK")
    return now - min(age, _SPREAD)


def _lost_a_peer(trace: TracebackType | None) -> bool:
    """Whether the error came out of what ranks do together."""
    frames = traceback.extract_tb(trace)
    return bool(frames) and any(folder in frames[-1].filename for folder in _TALK)


def _word_of_another(cause: Path, began: float) -> bool:
    """Whether another rank says what happened, now or soon."""
    end = time.monotonic() + _PATIENCE
    while not _is_new(cause, began) and time.monotonic() < end:
        time.sleep(0.2)
    return _is_new(cause, began)


def _claim(cause: Path, summary: str, began: float) -> bool:
    """Makes the file; False if another rank of this start did."""
    if cause.is_file() and not _is_new(cause, began):
        cause.unlink(missing_ok=True)
    try:
        with cause.open("x") as file:
            file.write(f"{summary}\n")
    except FileExistsError:
        return False
    return True


def _is_new(cause: Path, began: float) -> bool:
    """Whether the file is of this start of the run and not of an earlier one."""
    return cause.is_file() and cause.stat().st_mtime >= began


def _without_wrappers(trace: TracebackType | None) -> TracebackType | None:
    """The trace from where the command itself begins."""
    while trace is not None and trace.tb_next is not None and _is_wrapper(trace):
        trace = trace.tb_next
    return trace


def _is_wrapper(trace: TracebackType) -> bool:
    name = trace.tb_frame.f_code.co_filename
    return trace.tb_frame.f_code.co_name == "<module>" or any(part in name for part in _WRAPPERS)
