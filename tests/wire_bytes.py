"""Counts the bytes that a rank's node sends and receives in a training step: several jobs in one process group.

python tests/wire_bytes.py JOBS.json, on every node with RANK and the like set, where JOBS is a list of {"settings": a
DeepSpeed configuration, "feed_forward": a size of the frozen backbone, "split": whether the ranks split it,
"micro_batches": of a step, "steps": counted}. Rank r writes JOBS.r.json: for every job what crossed its network
interface in all counted steps, what the rank held between two of them, and what was trained. Only tests/measure_wire.py
starts it.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tiny import CELLS, CHANNELS, tiny_batch, tiny_model
from transformers import PreTrainedModel

from hyperpelt_ds import dist
from hyperpelt_ds.backbones import Backbone
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Batch
from hyperpelt_ds.model import HyperPELT
from hyperpelt_ds.train import engine
from hyperpelt_ds.train.control import Control

INTERFACE = "eth0"
TASKS = ("a", "b", "c")
SAMPLES = 4
"""Of a micro-batch, as tiny.tiny_batch makes it."""
WARM_UP = 3
"""Steps that are not counted: ZeRO-3 learns in which order parameters are used, and moments are made."""
OVERRIDES = [
    "model.backbone=tiny",
    *("modules.prefix_length=3", "modules.bottleneck=4", "hypernet.embedding_size=384", "hypernet.hidden_size=384"),
    *("vision.encoder=resnet18", f"vision.cells={CELLS}", f"vision.channels={CHANNELS}", "train.warmup_steps=0"),
]


def config(micro_batches: int, ranks: int) -> Config:
    """The run of a job."""
    batch = [f"train.micro_batch={SAMPLES}", f"train.global_batch={SAMPLES * micro_batches * ranks}"]
    return Config().override([*OVERRIDES, *batch, f"data.lanes={ranks}"])


def backbone(feed_forward: int) -> PreTrainedModel:
    return tiny_model("t5", d_ff=feed_forward)


def crossed() -> tuple[int, int]:
    """Bytes that the interface has sent and received, with all headers, once every rank is done with what it does."""
    dist.barrier()
    lines = Path("/proc/net/dev").read_text().splitlines()
    numbers = next(line.split(":")[1].split() for line in lines if line.strip().startswith(f"{INTERFACE}:"))
    counted = int(numbers[8]), int(numbers[0])
    dist.barrier()
    return counted


def step(wrapped: engine.Engine, control: Control, batch: Batch, micro_batches: int) -> None:
    """One step as the loop takes it: what all ranks say to each other first, then the micro-batches and the update."""
    control.poll(SAMPLES * micro_batches)
    for number in range(1, micro_batches + 1):
        wrapped.backward(wrapped.forward(batch, last=number == micro_batches).loss)
    assert wrapped.step()


def held(frozen: Backbone) -> int:
    """Bytes of all tensors that are there, but for the frozen backbone's."""
    weights = [*frozen.model.parameters(), *frozen.model.buffers(), frozen.initial_norms]
    known = {tensor.untyped_storage().data_ptr() for tensor in weights}
    gc.collect()
    storages = [thing.untyped_storage() for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in known}.values())


def run(job: dict[str, Any], settings: Path) -> dict[str, Any]:
    ranks, micro_batches = dist.world_size(), job["micro_batches"]
    chosen = config(micro_batches, ranks)
    frozen = Backbone(backbone(job["feed_forward"]), None, chosen.modules)
    numbers = sum(parameter.numel() for parameter in frozen.model.parameters())
    if job["split"]:
        frozen.shard()
    others = held(frozen)  # DeepSpeed's globals keep what belonged to the jobs before
    torch.manual_seed(0)
    model = HyperPELT(chosen, frozen, TASKS).train()
    trainables = [[p.numel(), type(m).__name__] for m in model.modules() for p in m.parameters(recurse=False)]
    wrapped, control, batch = engine.start(model, chosen, settings), Control(), tiny_batch(frozen.model)
    for _ in range(WARM_UP):
        step(wrapped, control, batch, micro_batches)
    dist.barrier()
    time.sleep(0.5)  # gloo's own thread lets go a moment after the ranks go on
    stays = held(frozen) - others
    before = crossed()
    for _ in range(job["steps"]):
        step(wrapped, control, batch, micro_batches)
    sent, received = (after - earlier for after, earlier in zip(crossed(), before, strict=True))
    return {
        "sent": sent,
        "received": received,
        "held": stays,
        "trainables": trainables,
        "backbone": numbers,
    }


if __name__ == "__main__":
    jobs = Path(sys.argv[1])
    engine.start_distributed()
    found = []
    for number, job in enumerate(json.loads(jobs.read_text())):
        settings = jobs.with_name(f"settings_{number}_{dist.rank()}.json")
        settings.write_text(json.dumps(job["settings"]))
        found.append(run(job, settings))
    jobs.with_suffix(f".{dist.rank()}.json").write_text(json.dumps(found))
    dist.leave()
