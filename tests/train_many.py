"""Trains several configurations one after another in one process group: starting DeepSpeed takes longer than they do.

deepspeed tests/train_many.py JOBS.json, where JOBS is a list of {"config": ..., "ds_config": ..., "run_dir": ...}; a
config with `init_from` may name an earlier job's folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hyperpelt_ds import dist
from hyperpelt_ds.config import from_dict
from hyperpelt_ds.train import loop

if __name__ == "__main__":
    for job in json.loads(Path(next(a for a in sys.argv[1:] if a.endswith(".json"))).read_text()):
        loop.train(from_dict(job["config"]), job["ds_config"], job["run_dir"], job.get("resume", False))
    dist.leave()
