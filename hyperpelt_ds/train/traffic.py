"""Bytes that a rank sends in one optimizer step, and receives as many; docs/scaling.md derives the formulas.

As DeepSpeed 0.19.8 does it, on the ring algorithms of gloo and NCCL; tests/test_wire.py measures it on a network
interface. A frozen backbone sends nothing unless it is split over the ranks (backbones/sharded.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hyperpelt_ds.config import Config
from hyperpelt_ds.train import zero
from hyperpelt_ds.train.zero import Setup

BACKENDS = ("gloo", "nccl")
MESSAGE = 400
"""Bytes of a message that carries next to nothing, headers and acknowledgements included (measured: 320 to 560)."""
NORMS = 2
"""All-reduces of one number that ZeRO's own clipping and checks take in a step."""


@dataclass(frozen=True)
class Parameter:
    """A trainable: how many numbers, and the class of the module it belongs to."""

    size: int
    owner: str


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by a rank in an optimizer step."""

    gradients: float
    weights: float
    backbone: float
    """Of frozen weights: shares of what other ranks need whole. 0 if every rank has all of them."""
    control: float
    """Of our own agreement between steps and of ZeRO's norms: small, but its messages grow with the ranks."""

    @property
    def total(self) -> float:
        return self.gradients + self.weights + self.backbone + self.control


def trainables(model: nn.Module) -> Iterator[Parameter]:
    """Those of a model that no engine has taken apart yet."""
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield Parameter(parameter.numel(), type(module).__name__)


def of_run(model: nn.Module, config: Config, settings: dict[str, Any], world_size: int, backend: str) -> Traffic | None:
    """What a rank will send in a step of training `model`, which no engine has yet, with merged `settings`.

    None where it is not known: what zero.not_counted names, frozen parameters that stage 3 hands around, and a split
    backbone, of which a run does not know how much each of its passes gathers.
    """
    setup = zero.of(settings, config, world_size)
    if zero.not_counted(settings) or setup.splits_backbone:
        return None
    if setup.stage == 3 and not all(parameter.requires_grad for parameter in model.parameters()):
        return None
    return per_rank(setup, list(trainables(model)), backend)


def per_rank(setup: Setup, trainables: Sequence[Parameter], backend: str, gathered: int = 0) -> Traffic:
    """What a rank sends in a step of `setup`, by what it is. `gathered`: bytes of frozen weights that become whole in a
    micro-batch, where the backbone is split."""
    crossing = (setup.world_size - 1) / setup.world_size
    gradients = crossing * sum(p.size * gradient_width(setup, p) for p in trainables)
    times = setup.accumulation if setup.stage >= 2 else 1
    weights = 0.0
    if setup.stage in (1, 2):
        weights = crossing * setup.weights.itemsize * sum(p.size for p in trainables)
    elif setup.stage == 3:
        fetched = sum(p.size * _weight_width(setup, p) for p in trainables if p.size >= setup.persistent)
        standing = sum(p.size * _weight_width(setup, p) for p in trainables if p.size < setup.persistent)
        weights = crossing * (setup.accumulation * gathers(setup, trainables) * fetched + standing)
    backbone = crossing * setup.accumulation * gathered if setup.splits_backbone else 0.0
    control = MESSAGE * 2 * (setup.world_size - 1) * (1 + (NORMS if setup.stage else 0))
    return Traffic(reductions(setup, backend) * times * gradients, weights, backbone, control)


def reductions(setup: Setup, backend: str) -> int:
    """How often a gradient goes around: twice in an all-reduce, once in a reduce-scatter, which gloo does not have:
    torch makes it from an all-reduce. Stages 1 and 2 reduce whole buckets, each rank then keeps its part."""
    return 1 if setup.stage == 3 and setup.scatters and backend == "nccl" else 2


def gathers(setup: Setup, trainables: Sequence[Parameter]) -> float:
    """How often stage 3 gathers a parameter in a micro-batch: once if it is kept from forward to backward, else twice.

    The way from a use in the forward pass to that in the backward pass grows from 0 to twice the trainables, so of more
    than `kept_ahead` numbers a share is gathered again.
    """
    way = 2 * sum(parameter.size for parameter in trainables)
    return 2 - min(1.0, setup.kept_ahead / way)


def gradient_width(setup: Setup, parameter: Parameter) -> int:
    """Bytes of a number of the parameter's gradient on the wire."""
    halves = setup.autocast is not None and parameter.owner in setup.halved
    return setup.autocast.itemsize if setup.autocast is not None and halves else setup.reduced.itemsize


def _weight_width(setup: Setup, parameter: Parameter) -> int:
    return gradient_width(setup, parameter) if parameter.owner in setup.halved else setup.weights.itemsize
