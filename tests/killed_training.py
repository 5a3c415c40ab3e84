"""A training that kills itself, as a power cut would: no handler runs, no other process is told.

python or deepspeed tests/killed_training.py CONFIG.json DS_CONFIG RUN_DIR WHERE, where WHERE is "commit N", to die
before the N-th change to the disk by the thread that writes checkpoints, "forward N R", to die on rank R before the
N-th forward pass, or "nowhere". What is not reached kills nobody. Goes on from what is in RUN_DIR.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from hyperpelt_ds import dist
from hyperpelt_ds.config import load
from hyperpelt_ds.train import engine, loop

CHANGES = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")


def dying(call: Callable[..., Any], before: Callable[[], bool]) -> Callable[..., Any]:
    def instead(*arguments: Any, **options: Any) -> Any:
        if before():
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)

    return instead


def at(number: int, counts: Callable[[], bool]) -> Callable[[], bool]:
    """Whether this is the `number`-th call that counts."""
    seen = 0

    def reached() -> bool:
        nonlocal seen
        seen += counts()
        return counts() and seen == number

    return reached


if __name__ == "__main__":
    config, ds_config, run_dir, where = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    kind, *numbers = where.split()
    if kind == "commit":
        reached = at(int(numbers[0]), lambda: threading.current_thread().name.startswith("checkpoint"))
        for name in CHANGES:
            setattr(os, name, dying(getattr(os, name), reached))
    elif kind == "forward":
        reached = at(int(numbers[0]), lambda: dist.rank() == int(numbers[1]))
        engine.Engine.forward = dying(engine.Engine.forward, reached)
    loop.train(load(config), ds_config, run_dir, resume=True)
    dist.leave()
