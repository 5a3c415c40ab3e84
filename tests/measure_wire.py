"""What training really sends, from nodes with a network of their own, beside what hyperpelt_ds.forecast says.

python tests/measure_wire.py docs/results/wire.jsonl   (root; writes the records that docs/scaling.md shows)
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cluster import Cluster
from conftest import ROOT
from wire_bytes import INTERFACE, SAMPLES, TASKS, backbone, config

from hyperpelt_ds.backbones.sharded import Sizes
from hyperpelt_ds.config import Config
from hyperpelt_ds.forecast import memory
from hyperpelt_ds.forecast.micro_batch import MicroBatch, Mix, look
from hyperpelt_ds.train import traffic, zero
from hyperpelt_ds.train.traffic import Parameter

SECONDS = 900
STEPS = 2
PORT = 29_500
SMALL, LARGE = 2_048, 23_000
"""Feed-forward sizes of the frozen backbone; the larger one has more than ten times as many weights."""


class Job(NamedTuple):
    """One training: the DeepSpeed configuration beside what all have, and how it is run."""

    name: str
    zero: dict[str, Any]
    top: dict[str, Any] = {}  # noqa: RUF012
    micro_batches: int = 1
    feed_forward: int = SMALL
    split: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        common = {"overlap_comm": False, "contiguous_gradients": True, "reduce_bucket_size": 1_000_000}
        return {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {**common, **self.zero}, **self.top}


AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
STAGES = [Job(f"stage {stage}", {"stage": stage}) for stage in range(4)]
TWICE = [job._replace(name=f"{job.name}, two micro-batches", micro_batches=2) for job in STAGES]
LARGER = {
    2: TWICE[2]._replace(name="stage 2, two micro-batches, ten times the backbone", feed_forward=LARGE),
    4: STAGES[3]._replace(name="stage 3, ten times the backbone", feed_forward=LARGE),
}
CHOICES = [
    Job("stage 3, gathered again", {"stage": 3, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}),
    Job("stage 2, bf16", {"stage": 2}, {"bf16": {"enabled": True}}),
    Job("stage 2, linear maps in bf16", {"stage": 2}, AUTOCAST),
]
SPLIT = [
    Job("stage 2, two micro-batches, the backbone split", {"stage": 2}, micro_batches=2, split=True),
    Job("stage 2, ten times the backbone, split", {"stage": 2}, feed_forward=LARGE, split=True),
]
JOBS = {1: [STAGES[2]], 2: [*TWICE, LARGER[2], *CHOICES, *SPLIT], 4: [*STAGES, LARGER[4], *SPLIT]}
"""Ranks, one on a node -> what they train."""


def measure(cluster: Cluster, ranks: int, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """A record a job: bytes that the busiest node sent in a step, what is foretold, and what a rank held."""
    folder = cluster.folder / f"{ranks}_ranks"
    folder.mkdir()
    file = folder / "jobs.json"
    lines = [{**job._asdict(), "settings": job.settings, "steps": STEPS} for job in jobs]
    file.write_text(json.dumps(lines))
    started = [
        cluster.start(
            node, sys.executable, ROOT / "tests" / "wire_bytes.py", file, env=_environment(cluster, rank, ranks)
        )
        for rank, node in enumerate(cluster.nodes[:ranks])
    ]
    for done in cluster.finish(*started, timeout=SECONDS):
        assert done.returncode == 0, done.stdout[-6000:]
    found = [json.loads(file.with_suffix(f".{rank}.json").read_text()) for rank in range(ranks)]
    return [_record(job, folder, list(of_ranks)) for job, *of_ranks in zip(jobs, *found, strict=True)]


def _environment(cluster: Cluster, rank: int, ranks: int) -> dict[str, str]:
    address = {"MASTER_ADDR": cluster.address["n1"], "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": INTERFACE}
    place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    return {**address, **place, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def _record(job: Job, folder: Path, of_ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    settings = folder / "read.json"
    settings.write_text(json.dumps(job.settings))
    given = config(job.micro_batches, len(of_ranks)).override([f"model.shard_backbone={json.dumps(job.split)}"])
    chosen = zero.read(settings, given, len(of_ranks))
    trainables = [Parameter(*pair) for pair in of_ranks[0]["trainables"]]
    seen = _seen(job, given, folder / "backbone") if job.split else MicroBatch(0, 0, 0, 0)
    parts = memory.per_rank(chosen, trainables, Sizes((0,), 0), seen)
    return {
        "name": job.name,
        "world_size": len(of_ranks),
        "network": "nodes",
        "trainable": sum(parameter.size for parameter in trainables),
        "backbone": of_ranks[0]["backbone"],
        "sent": max(max(rank["sent"], rank["received"]) for rank in of_ranks) / STEPS,
        "formula": traffic.per_rank(chosen, trainables, "gloo", seen.gathered).total,
        "held": max(rank["held"] for rank in of_ranks),
        "held_formula": sum(parts[name] for name in memory.between_steps(chosen)),
    }


def _seen(job: Job, given: Config, folder: Path) -> MicroBatch:
    """What a micro-batch of the job gathers, from the configuration of its backbone."""
    backbone(job.feed_forward).config.save_pretrained(folder)
    mix = Mix(SAMPLES, len(TASKS), SAMPLES)
    return look(given.override([f"model.backbone={folder}"]), len(TASKS), mix, None, torch.float32).micro_batch


def everything(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of all JOBS."""
    with Cluster(folder, nodes=max(JOBS)) as cluster:
        for ranks, jobs in JOBS.items():
            yield from measure(cluster, ranks, jobs)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place, open(sys.argv[1], "w") as out:
        out.writelines(json.dumps(record) + "\n" for record in everything(Path(place)))
