"""What a configuration trains and how large it is, found on the meta device: nothing is downloaded or held in memory.

The model that is counted is the one that would be trained, so no formula can disagree with it. This file must not know
a recipe by name, and nothing of optimizers, precision or ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperpelt_ds.backbones import Backbone
from hyperpelt_ds.backbones.shapes import sentence_size, untrained
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Batch, Weights
from hyperpelt_ds.model import HyperPELT

FP32_BYTES = 4
RANKS = (1, 8, 64)


@dataclass(frozen=True)
class Estimate:
    """Parameters and bytes of a configuration. Shares are fractions of 1; `table` prints them as percentages."""

    backbone: str
    tasks: int
    backbone_parameters: int
    """The published model alone, its layer norms included."""
    trainable: int
    trainable_parts: dict[str, int]
    """By what they belong to, <branch>/<part>; they add up to `trainable`."""
    total: int
    """The whole model as it runs: the backbone, its trained norms counted once, and what is put beside it."""
    times_backbone: float
    """As tables of text tasks count: 1 + trainable / backbone, how many backbones all tasks together need. A trained
    backbone replaces the published one, so that it counts once."""
    trainable_a_task: float
    """As tables of text tasks count: trainable / (tasks x backbone)."""
    trainable_of_total: float
    """As tables of vision-and-language tasks count: trainable / total. Never to be put beside the one above."""
    trainable_bytes: int
    """In fp32, as checkpoints have them."""
    backbone_bytes: dict[str, int]
    """In its own type, what each of so many ranks holds of the frozen model if these split it (model.shard_backbone),
    with the block that is whole; "1" is the whole model. Empty if it is trained."""
    weights_bytes: dict[str, int]
    """In fp32, what one condition of each branch (a task, an image, the one set there is) makes for all sites."""


def estimate(config: Config, tasks: int = 0) -> Estimate:
    """Counts `config` with so many tasks (0: those of data.tasks).

    Raises ValueError if there is no number of tasks, and for a backbone or sentence encoder whose shape is unknown.
    """
    tasks = tasks or len(config.data.tasks)
    if tasks < 1:
        raise ValueError(
            f"the number of tasks must be at least 1, got {tasks}: data.tasks may be empty (all of the manifest), then "
            f"give --tasks"
        )
    with torch.device("meta"), torch.no_grad():
        shape = untrained(config.model.backbone)
        published = _size(shape)
        shape.to(getattr(torch, config.model.dtype))
        model = model_of(config, shape, tasks)
        weights = _one_of_each(config, model)
        ranks = () if config.model.train_backbone else RANKS
        resident = {str(count): model.backbone.sizes.held(count) for count in ranks}
    counts, parts = model.parameter_counts(), _parts(model)
    trainable = counts["trainable"]
    assert sum(parts.values()) == trainable, "a part is counted twice, or not at all"
    return Estimate(
        backbone=config.model.backbone,
        tasks=tasks,
        backbone_parameters=published,
        trainable=trainable,
        trainable_parts=parts,
        total=counts["total"],
        times_backbone=trainable / published + (0 if config.model.train_backbone else 1),
        trainable_a_task=trainable / (tasks * published),
        trainable_of_total=trainable / counts["total"],
        trainable_bytes=FP32_BYTES * trainable,
        backbone_bytes=resident,
        weights_bytes=weights,
    )


def table(estimate: Estimate, frozen: bool = True) -> str:
    """The estimate as text, with the bytes of the frozen model or without."""
    held = estimate.backbone_bytes.items() if frozen else ()
    lines = [
        (f"backbone {estimate.backbone}", f"{estimate.backbone_parameters:,}", ""),
        (f"trainable, {estimate.tasks} task{'s' if estimate.tasks > 1 else ''}", f"{estimate.trainable:,}", ""),
        *((f"  {name}", f"{count:,}", "") for name, count in estimate.trainable_parts.items()),
        ("total", f"{estimate.total:,}", ""),
        ("text tables: all tasks together", f"{estimate.times_backbone:.3f}x", "of the backbone"),
        ("text tables: trainable a task", f"{100 * estimate.trainable_a_task:.3f} %", "of tasks x backbone"),
        ("V&L tables: trainable", f"{100 * estimate.trainable_of_total:.3f} %", "of total"),
        ("trainable, fp32", amount(estimate.trainable_bytes), ""),
        *((f"frozen, {'whole' if n == '1' else f'split over {n}'}", amount(size), "on each rank") for n, size in held),
        *((f"weights for one: {name}", amount(size), "fp32") for name, size in estimate.weights_bytes.items()),
    ]
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in lines)


def model_of(config: Config, shape: Any, tasks: int) -> HyperPELT:
    """The model of a run as `model.build` makes it, around a backbone without weights."""
    backbone = Backbone(shape, None, config.modules, config.model.train_backbone)
    if config.model.quantize == "int8":
        backbone.quantize()
    descriptions = None
    if "description" in config.hypernet.conditions and config.hypernet.sentence_encoder is not None:
        descriptions = torch.empty(tasks, sentence_size(config.hypernet.sentence_encoder))
    return HyperPELT(config, backbone, [str(task) for task in range(tasks)], descriptions)


def _parts(model: HyperPELT) -> dict[str, int]:
    """Trainable parameters by what they belong to; parts that are not there are left out."""
    network = model.hypernet
    parts: dict[str, int] = {}

    def add(name: str, module: nn.Module | None) -> None:
        size = sum(p.numel() for p in module.parameters() if p.requires_grad) if module is not None else 0
        if size:
            parts[name] = parts.get(name, 0) + size

    for name, source in network.conditions.items():
        add(f"{name}/embedding", source)
    for name, embeddings in network.sites.items():
        add(f"{name}/layers_and_blocks", embeddings)
    for name, stacks in network.controllers.items():
        for controller in stacks.children():
            add(f"{name}/projector", controller.get_submodule("projector"))
            for kind, head in controller.get_submodule("heads").named_children():
                for part, module in head.named_children():
                    add(f"{name}/{kind}_head" if part == "linear" else f"{name}/{kind}_{part}", module)
    if network.free is not None:
        for kind, module in network.free.named_children():
            add(f"plain/{kind}", module)
    add("image_tokens", network.image_tokens)
    add("norms", network.norms)
    add("backbone", model.trained_backbone)
    return parts


def _one_of_each(config: Config, model: HyperPELT) -> dict[str, int]:
    """Bytes of the weights that the hypernetwork makes from one task and one image."""
    one, vision = torch.zeros(1, dtype=torch.long), config.vision
    text = one.unsqueeze(0)
    images = torch.zeros(1, vision.cells, vision.channels) if vision.encoder is not None else None
    batch = Batch(
        input_ids=text, attention_mask=text, labels=text, targets=one, tasks=one, task_rows=one,
        images=images, image_rows=one, loss_weights=one, samples=(),
    )  # fmt: skip
    weights: Weights = model.hypernet(batch)
    names = ["plain set" if name == "free" else name for name in model.hypernet.branch_names]
    sizes = {name: _total(branch[1:]) for name, branch in zip(names, weights.branches, strict=True)}
    if weights.tokens is not None:
        sizes["image tokens"] = _total(weights.tokens.values)
    return {name: FP32_BYTES * size for name, size in sizes.items()}


def _total(part: Any) -> int:
    """Numbers in (tuples of) tensors."""
    if part is None or isinstance(part, Tensor):
        return 0 if part is None else part.numel()
    return sum(_total(item) for item in part)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def amount(count: int) -> str:
    """Bytes in the largest unit that fits."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    unit = min(int(math.log(max(count, 1), 1024)), len(units) - 1)
    return f"{count / 1024**unit:.{2 if unit else 0}f} {units[unit]}"
