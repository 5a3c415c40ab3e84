"""Trains a small network of odd sizes and takes its state from folder to folder, many times in one process group.

python or deepspeed tests/train_states.py JOBS.json, where JOBS is a list of {"settings": a DeepSpeed configuration,
"optimizer": "adamw" or "sgd", "dropout": a share, "micro_batch": samples, "load": a checkpoint or null, "saves":
[[steps, run_dir], ...]}. A job that loads starts from other weights, and asserts that it then holds, bit for bit, what
the files say. Every save has its losses beside it, in losses.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file
from torch import nn

from hyperpelt_ds import dist
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import StreamState
from hyperpelt_ds.train import checkpoint, deepspeed_json, engine, randomness

CONFIG = Config().override(["train.global_batch=8", "train.micro_batch=2", "train.warmup_steps=3", "train.steps=60"])
CONFIG = CONFIG.override(["train.learning_rate=0.01", "train.weight_decay=0.1", "data.lanes=8"])
STREAM = StreamState(0, {}, 1, 8, 24, {})


class Network(nn.Module):
    """Two groups of parameters, none of a size that ranks could share evenly, one alone, and a frozen one."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 5)
        self.norm = nn.LayerNorm(5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.inner = nn.Linear(5, 7)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(7, 1, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.frozen(self.table(ids)))
        return (self.outer(self.dropout(self.inner(hidden).tanh())).float().squeeze(1) - ids).square().mean()


def allow_fp16() -> None:
    """Lets DeepSpeed's fp16 mode run on any CPU. It refuses ("Type fp16 is not supported on your device.", seen in
    0.19.8) where a library that neither torch nor its own code needs for this lacks the type."""
    get_accelerator().is_fp16_supported = lambda: True


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(engine.parameter_groups(model, 0.1), lr=0.01, momentum=0.9)


def samples(step: int) -> torch.Tensor:
    """Those of a step, of all ranks."""
    return torch.randint(3, (CONFIG.train.global_batch,), generator=torch.Generator().manual_seed(step))


def start(job: dict[str, Any], settings: Path) -> engine.Engine:
    torch.manual_seed(1 if job["load"] else 0)
    model = Network(job["dropout"])
    randomness.seed(7, dist.rank())
    config = CONFIG.override([f"train.micro_batch={job['micro_batch']}"])
    if job["optimizer"] == "adamw":
        return engine.start(model, config, settings)
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, engine.learning_rate_factor(CONFIG.train))
    merged = deepspeed_json.merge(settings, config, dist.world_size())
    wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=merged)
    return engine.Engine(wrapped, {})


def train(wrapped: engine.Engine, step: int, size: int = 2) -> float:
    """One step on samples that depend on the step alone; the mean loss over all ranks."""
    micro_batches = samples(step)[dist.rank() :: dist.world_size()].split(size)
    losses = []
    for number, micro_batch in enumerate(micro_batches, 1):
        loss = wrapped.forward(micro_batch, last=number == len(micro_batches))
        wrapped.backward(loss)
        losses.append(loss.item())
    wrapped.step()
    return sum(dist.gather(sum(losses))) / len(losses) / dist.world_size()


def compare(wrapped: engine.Engine, folder: Path) -> None:
    """Asserts that the engine holds what a checkpoint says, and computes with those weights."""
    now, state = wrapped.snapshot(), json.loads((folder / "state.json").read_text())
    dtypes = {p.dtype for p in wrapped.model.parameters()}
    assert wrapped.learning_rate() == state["training"]["schedule"]["_last_lr"][0]
    assert now.counters["schedule"] == state["training"]["schedule"]
    assert now.counters["updates"] == state["training"]["updates"] and len(now.counters["updates"]) in (0, 6)
    if wrapped.precision and wrapped.precision == state["precision"]:
        assert now.counters["loss_scale"] == state["training"]["loss_scale"]
    with deepspeed.zero.GatheredParameters(list(wrapped.model.parameters()), enabled=wrapped.stage == 3):
        used = {name: parameter.detach().clone() for name, parameter in wrapped.model.named_parameters()}
    if dist.rank() > 0:
        return
    weights, moments = load_file(folder / "weights.safetensors"), load_file(folder / "moments.safetensors")
    held = {f"{kind}/{name}": tensor for kind, own in now.moments.items() for name, tensor in own.items()}
    assert held.keys() == moments.keys() and len(held) in (6, 12)
    assert all(torch.equal(held[name], moments[name]) for name in moments)
    assert now.weights.keys() == weights.keys() and len(weights) == 8
    [dtype] = dtypes
    for name, tensor in weights.items():
        assert torch.equal(now.weights[name], tensor.to(dtype).float() if "frozen" in name else tensor), name
        assert torch.equal(used[name], tensor.to(dtype)), name


def run(job: dict[str, Any], settings: Path) -> None:
    wrapped, step = start(job, settings), 0
    if job["load"]:
        step = checkpoint.load(Path(job["load"]), wrapped, CONFIG.train.seed).step
        compare(wrapped, Path(job["load"]))
    for steps, run_dir in job["saves"]:
        losses = [train(wrapped, step + number, job["micro_batch"]) for number in range(steps)]
        step += steps
        saver = checkpoint.Saver(Path(run_dir), CONFIG, "backbone")
        saver.save(wrapped, checkpoint.Progress(step, STREAM))
        saver.close()
        if dist.rank() == 0:
            (Path(run_dir) / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    jobs = Path(next(argument for argument in sys.argv[1:] if argument.endswith(".json")))
    engine.start_distributed()
    allow_fp16()
    for number, job in enumerate(json.loads(jobs.read_text())):
        settings = jobs.with_name(f"settings_{number}.json")
        if dist.rank() == 0:
            settings.write_text(json.dumps(job["settings"]))
        dist.barrier()
        run(job, settings)
    dist.leave()
