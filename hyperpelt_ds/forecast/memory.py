"""Bytes that a rank holds when a backward pass begins, by what they are for.

What DeepSpeed 0.19.8 really keeps, stage by stage; tests/test_wire.py compares the parts that stay between steps with
the tensors that are there. This file must not know a model, only how many numbers are trained and what a micro-batch
keeps.

Not counted: short-lived tensors of single operations, the allocator's slack, the device's own context and libraries.
"""

from __future__ import annotations

from collections.abc import Sequence

from hyperpelt_ds.backbones.sharded import Sizes
from hyperpelt_ds.forecast.micro_batch import MicroBatch
from hyperpelt_ds.train.traffic import Parameter
from hyperpelt_ds.train.zero import Setup

FP32 = 4
MOMENTS = 2
"""Of AdamW, in float32."""
ALL_REDUCE_AT_ONCE = 500_000_000
"""Numbers that stage 0 copies together to reduce them."""

_STANDING = ("frozen backbone", "trainable weights", "float32 masters", "optimizer state", "standing buffers")


def per_rank(setup: Setup, trainables: Sequence[Parameter], frozen: Sizes, micro_batch: MicroBatch) -> dict[str, int]:
    """Bytes on a rank's device by part; they add up."""
    return {
        "frozen backbone": frozen.held(setup.world_size if setup.splits_backbone else 1),
        **_states(setup, trainables),
        "generated weights": micro_batch.generated,
        "generated weights' gradients": micro_batch.generated,
        "kept activations": micro_batch.kept,
    }


def on_host(setup: Setup, trainables: Sequence[Parameter]) -> int:
    """Bytes of a rank that offloading moves to the host: masters, moments, their gradients, and stage 3's weights."""
    share = -(-_count(trainables) // setup.world_size)
    optimizer = (FP32 * (1 + MOMENTS) + FP32) * share if setup.offloads_optimizer else 0
    return optimizer + (setup.weights.itemsize * share if setup.offloads_weights else 0)


def between_steps(setup: Setup) -> tuple[str, ...]:
    """The parts that stay from step to step; the others come and go within one."""
    gradients_stay = setup.stage == 3 or (setup.stage == 1 and setup.accumulated != setup.weights)
    return (*_STANDING, "gradients") if gradients_stay else _STANDING


def _states(setup: Setup, trainables: Sequence[Parameter]) -> dict[str, int]:
    numbers, width = _count(trainables), setup.weights.itemsize
    share = -(-numbers // setup.world_size)
    own = numbers if setup.stage == 0 else share
    parts = {
        "trainable weights": width * numbers,
        "float32 masters": FP32 * own if setup.masters else 0,
        "optimizer state": MOMENTS * FP32 * own,
        "standing buffers": 0,
        "gathered weights": 0,
        "gradients": width * numbers,
        "reduction buffers": setup.reduced.itemsize * min(numbers, ALL_REDUCE_AT_ONCE),
    }
    if setup.stage == 1:
        parts["gradients"] += setup.accumulated.itemsize * numbers if setup.accumulated != setup.weights else 0
        parts["reduction buffers"] = setup.buckets * setup.bucket * setup.accumulated.itemsize
    elif setup.stage == 2:
        parts["gradients"] = setup.accumulated.itemsize * share
        parts["reduction buffers"] = setup.buckets * setup.bucket * width
    elif setup.stage == 3:
        whole = sum(p.size for p in trainables if p.size < setup.persistent)
        cut = numbers - whole
        parts["trainable weights"] = 0 if setup.offloads_weights else width * (share + whole)
        parts["gathered weights"] = width * min(cut, setup.live)
        parts["gradients"] = setup.accumulated.itemsize * share
        parts["standing buffers"] = setup.bucket * setup.reduced.itemsize
        parts["reduction buffers"] = 0
    if setup.offloads_optimizer:
        parts["float32 masters"] = parts["optimizer state"] = 0
        parts["gradients"] = min(parts["gradients"], setup.bucket * width)
    return parts


def _count(trainables: Sequence[Parameter]) -> int:
    return sum(parameter.size for parameter in trainables)
