"""On two ranks with disjoint tasks, text beside vision: the gradient is that of one process, at every ZeRO stage, and
a frozen map keeps nothing for the backward pass.

deepspeed tests/two_ranks_tasks.py CONFIG.json FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from hyperpelt_ds import config as configuration
from hyperpelt_ds import dist
from hyperpelt_ds import model as models
from hyperpelt_ds.contracts import TRAIN, Batch
from hyperpelt_ds.data.collate import collator_for
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.data.reader import Reader
from hyperpelt_ds.train import engine
from hyperpelt_ds.train.agreement import GradientWatch

TASKS = ("movie_sentiment", "easy_vqa", "shape_caption", "movie_rating")
SETTINGS = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000}}


def batches(config: configuration.Config, model: models.HyperPELT, order: tuple[str, str]) -> list[Batch]:
    """One batch of three samples of each task."""
    manifest = Manifest.load(config.data.manifest)
    reader, collator = Reader(manifest), collator_for(config, TASKS, model.backbone.tokenizer)
    chosen = [[reader.sample(task, TRAIN, number) for number in (0, 1, 5)] for task in order]
    return [collator(samples, reader.images(samples), [1.0] * 3) for samples in chosen]


def check(config: configuration.Config, folder: Path, stage: int) -> None:
    file = folder / f"{stage}.json"
    if dist.rank() == 0:
        file.write_text(json.dumps({"zero_optimization": {**SETTINGS["zero_optimization"], "stage": stage}}))
    dist.barrier()
    alone, together = (models.build(config, TASKS) for _ in range(2))
    names = [name for name, parameter in alone.named_parameters() if parameter.requires_grad]
    wrapped = engine.start(together, config, file)
    assert not keeps_its_input(torch.ones(3, 2)), f"stage {stage}: DeepSpeed's linear function is called for all"
    for order in [("movie_sentiment", "easy_vqa"), ("shape_caption", "movie_rating")]:
        both = batches(config, alone, order)
        alone.zero_grad()
        (sum(alone(batch).loss for batch in both) / 6).backward()
        watch = GradientWatch(wrapped.model)
        for last in (False, True):  # two micro-batches, of two samples each that count and then of one
            own = both[dist.rank()]
            weights = torch.tensor([0.0, 0.0, 1.0] if last else [1.0, 1.0, 0.0]) * wrapped.accumulation * 2 / 6
            wrapped.backward(wrapped.forward(own._replace(loss_weights=weights), last).loss)
        watch.check(wrapped)
        whole = dict(alone.named_parameters())
        for name, parameter in wrapped.model.named_parameters():
            if name in names:
                gradient = wrapped.gradient(parameter)
                apart = float((gradient - whole[name].grad).norm() / (whole[name].grad.norm() + 1e-6))
                assert apart < 1e-6, f"stage {stage}, {order}, {name}: {apart}"
        assert any(float(whole[name].grad.norm()) > 1e-3 for name in names)
        wrapped.step()
        alone.load_state_dict({**alone.state_dict(), **weights_on_all(wrapped)})


def keeps_its_input(weight: torch.Tensor) -> bool:
    """Whether a linear map's input is still in memory when only its output is asked for."""
    given = torch.ones(4, 2, requires_grad=True) * 1
    storage = StorageWeakRef(given.untyped_storage())
    output = torch.nn.functional.linear(given, weight)
    del given
    return output.requires_grad and not storage.expired()


def weights_on_all(wrapped: engine.Engine) -> dict[str, torch.Tensor]:
    return dist.gather(wrapped.weights())[0]


if __name__ == "__main__":
    engine.start_distributed()
    settings = configuration.load(sys.argv[-2]).override(["train.global_batch=4", "train.micro_batch=1"])
    for zero in range(4):
        check(settings, Path(sys.argv[-1]), zero)
    print("held", flush=True)
    dist.leave()
