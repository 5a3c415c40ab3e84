"""What one forward and backward pass keeps, generates and computes: from the real model, on tensors without memory.

The model that is looked at is the one that would be trained, so no formula can disagree with it. It runs the paths of a
CPU; a GPU's fused kernels keep no more. This file must not know ranks or ZeRO.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hyperpelt_ds import counts
from hyperpelt_ds.backbones.int8 import parts_of
from hyperpelt_ds.backbones.shapes import untrained
from hyperpelt_ds.backbones.sharded import Sizes
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Batch, Sample, Unmade
from hyperpelt_ds.forecast.gathering import Gathering, storage_of
from hyperpelt_ds.model import HyperPELT
from hyperpelt_ds.train.traffic import Parameter, trainables


@dataclass(frozen=True)
class Mix:
    """What a micro-batch is made of: so many different tasks, and images, 0 for none. Sources and targets are as long
    as the recipe allows, so that nothing is padding."""

    samples: int
    tasks: int
    images: int


@dataclass(frozen=True)
class MicroBatch:
    """Bytes of a micro-batch between forward and backward, and the FLOPs of matrix products and attention."""

    kept: int
    """Activations that the backward pass needs, and copies of frozen weights in autocast's type, where it makes them;
    generated weights left out."""
    generated: int
    """Weights, rows and tokens as the hypernetwork gives them, or the chunk of model.generation_budget_mb and what it
    is made from. Their gradients take as much again. Keys and values that attention makes of rows are activations."""
    forward_flops: int
    backward_flops: int
    gathered: int = 0
    """Of frozen weights: bytes that become whole one after another, forward and backward, where ranks split them; with
    padding left out."""
    gathers: int = 0
    """In how many pieces."""


@dataclass(frozen=True)
class Look:
    """What was seen of a configuration's model."""

    trainables: tuple[Parameter, ...]
    frozen: Sizes
    micro_batch: MicroBatch


def look(config: Config, tasks: int, mix: Mix, autocast: torch.dtype | None, weights: torch.dtype) -> Look:
    """Runs a micro-batch of `mix` through the model of `config` with so many tasks, trainables in type `weights`.

    Nothing is downloaded or held in memory. Raises ValueError for a mix that cannot be, and as `counts.estimate` does.
    """
    _check(config, tasks, mix)
    rows = _rows(config, mix)  # the host looks at these, so they are real
    with FakeTensorMode(allow_non_fake_inputs=True):
        with _default(getattr(torch, config.model.dtype)):
            shape = untrained(config.model.backbone, config.model.dropout)
        with _default(weights):
            model = counts.model_of(config, shape, tasks)
        if config.model.activation_checkpointing:
            shape.gradient_checkpointing_enable({"use_reentrant": False})
        for module in shape.modules():
            if hasattr(module, "layerdrop"):
                module.layerdrop = cast(Any, _Never())
        model.train()
        return Look(
            tuple(trainables(model)),
            Sizes((), 0) if model.backbone.trainable else model.backbone.sizes,
            _run(model, _batch(config, mix, *rows), autocast, config.model.shard_backbone),
        )


class _Never:
    """A share of layers to drop, none: transformers 5.17 compares even 0 with a random number, and one that was drawn
    without memory has no value."""

    def __gt__(self, other: object) -> bool:
        return False


def _run(model: HyperPELT, batch: Batch, autocast: torch.dtype | None, split: bool) -> MicroBatch:
    backbone = model.backbone
    weights = (*model.parameters(), *backbone.model.parameters(), *backbone.model.buffers(), backbone.initial_norms)
    known = {storage_of(part) for weight in weights for part in parts_of(weight)[0].values()}
    gathering = Gathering(backbone.groups if split else ())
    if split:
        backbone.shards = cast(Any, gathering)
    made: dict[int, Any] = {}
    kept: dict[int, Any] = {}  # alive, or the next storage would get the address of a freed one

    def note(module: nn.Module, args: Any, output: Any) -> None:
        made.update({storage_of(t): t.untyped_storage() for t in _leaves(output[:1] + output[2:]) if t.requires_grad})
        chunks.append(_in_chunks(output.branches))

    def keep(tensor: Tensor) -> Tensor:
        if storage_of(tensor) not in known:
            kept[storage_of(tensor)] = tensor.untyped_storage()
        return tensor

    chunks: list[bool] = []
    hook = model.hypernet.register_forward_hook(note)
    with FlopCounterMode(display=False) as counter:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, gathering.again),
            torch.autocast("cpu", autocast, enabled=autocast is not None),
        ):
            loss = model(batch).loss
        forward = counter.get_total_flops()
        loss.backward()
    hook.remove()
    chunk = int((model.generation_budget or 0) * 2**20) if any(chunks) else 0
    return MicroBatch(
        kept=sum(storage.nbytes() for key, storage in kept.items() if key not in made),
        generated=sum(storage.nbytes() for key, storage in made.items() if key not in known) + chunk,
        forward_flops=forward,
        backward_flops=counter.get_total_flops() - forward,
        gathered=sum(gathering.sizes),
        gathers=len(gathering.sizes),
    )


def _leaves(part: Any) -> list[Tensor]:
    if isinstance(part, Tensor):
        return [part]
    return [leaf for item in part for leaf in _leaves(item)] if isinstance(part, tuple) else []


def _in_chunks(part: Any) -> bool:
    return isinstance(part, Unmade) or (isinstance(part, tuple) and any(map(_in_chunks, part)))


def _check(config: Config, tasks: int, mix: Mix) -> None:
    if not 1 <= mix.tasks <= min(tasks, mix.samples):
        raise ValueError(
            f"a micro-batch of {mix.samples} samples out of {tasks} tasks cannot have {mix.tasks} different ones"
        )
    if not 0 <= mix.images <= mix.samples:
        raise ValueError(f"a micro-batch of {mix.samples} samples cannot have {mix.images} different images")
    if mix.images and config.vision.encoder is None:
        raise ValueError(f"{mix.images} images in a micro-batch, but vision.encoder is not set")


def _rows(config: Config, mix: Mix) -> tuple[Tensor, Tensor | None]:
    """Which sample has which task and image, side by side."""
    places = torch.arange(mix.samples)
    images = places * mix.images // mix.samples if mix.images else torch.full_like(places, -1)
    return places * mix.tasks // mix.samples, images if config.vision.encoder else None


def _batch(config: Config, mix: Mix, task_rows: Tensor, image_rows: Tensor | None) -> Batch:
    data, vision, n = config.data, config.vision, mix.samples
    ids = torch.zeros(n, data.max_source_length, dtype=torch.long)
    labels = torch.zeros(n, data.max_target_length, dtype=torch.long)
    image = "image" if mix.images else None
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=labels,
        targets=torch.arange(labels.numel()),
        tasks=torch.arange(mix.tasks),
        task_rows=task_rows,
        images=torch.zeros(max(mix.images, 1), vision.cells, vision.channels) if vision.encoder else None,
        image_rows=image_rows,
        loss_weights=torch.ones(n),
        samples=tuple(Sample(str(number), "task", "", "", image=image) for number in range(n)),
    )


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
