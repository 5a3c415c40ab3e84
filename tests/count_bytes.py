"""Trains several configurations one after another in one process group, as train_many.py does, and notes in each run's
folder what every rank sent over eth0 meanwhile. For ranks on nodes of their own (tests/cluster.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from hyperpelt_ds import dist
from hyperpelt_ds.config import from_dict
from hyperpelt_ds.train import loop


def sent() -> int:
    """Bytes that have left this process's network, headers included."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.split(":")[0].strip() == "eth0").split(":")[1].split()[8])


if __name__ == "__main__":
    before = sent()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        loop.train(from_dict(job["config"]), job["ds_config"], job["run_dir"])
        dist.barrier()
        now = sent()
        Path(job["run_dir"], f"sent_{dist.rank()}").write_text(str(now - before))
        before = now
    torch.distributed.destroy_process_group()
