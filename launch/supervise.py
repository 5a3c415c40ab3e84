"""Starts a training again and again until it is done. What it decides is in hyperpelt_ds/train/supervision.py."""

from __future__ import annotations

import sys
from pathlib import Path

from command import run


def supervise(*command: str, cycles: int = 3, wait: int = 10, grace: int = 60) -> None:
    """Start a training, and again after a crash, a hang or a lost machine, from its newest checkpoint.

    It ends with 0 when the run is done, and with the run's own exit code when that needs a human (65 data, 66 numerics,
    67 ranks differ), when there was no newer checkpoint in so many starts, when another start took the run over, or
    when it was itself asked to stop: SIGTERM, Ctrl-C and a closed terminal reach the run, which saves and leaves (75).

    Examples:
        python launch/supervise.py -- deepspeed --num_accelerators 2 launch/train.py --recipe demo
            --ds_config ds_configs/zero2_cpu.json --run_dir runs/demo
        python launch/supervise.py --cycles 5 -- python launch/train.py --recipe demo
            --ds_config ds_configs/zero2_cpu.json --run_dir runs/demo

    Args:
        command: after `--`, the training as it would be typed without this; --resume is added
        cycles: starts without a newer checkpoint after which it gives up
        wait: seconds before the next start, doubled after each start without a newer checkpoint
        grace: seconds that a run has to save when it is asked to stop; then it is ended, and what came after its newest
            checkpoint is lost
    """
    from hyperpelt_ds.train.supervision import Supervisor

    if cycles < 1:
        raise ValueError(f"--cycles must be at least 1, got {cycles}")
    run_dir = _run_dir(command)
    sys.exit(
        Supervisor(command, run_dir, cycles, wait, grace, lambda text: print(f"supervise: {text}", flush=True)).run()
    )


def _run_dir(command: tuple[str, ...]) -> Path:
    for word, following in zip(command, (*command[1:], ""), strict=True):
        name, sign, value = word.replace("--run-dir", "--run_dir").partition("=")
        if name == "--run_dir" and (value if sign else following):
            return Path(value if sign else following)
    raise ValueError(
        "the command after -- has no --run_dir: python launch/supervise.py -- deepspeed launch/train.py ..."
    )


if __name__ == "__main__":
    run(supervise)
