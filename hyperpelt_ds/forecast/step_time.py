"""Seconds of an optimizer step on machines whose speeds are given: a model, checked in bytes and never in seconds.

step = compute + communication + agreement + waiting for data. Nothing overlaps in it, although DeepSpeed hides some
reductions behind the backward pass, so that it is the slower end. This file must not know a model or a stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hyperpelt_ds.forecast.micro_batch import MicroBatch
from hyperpelt_ds.train.traffic import Traffic
from hyperpelt_ds.train.zero import Setup


@dataclass(frozen=True)
class Machine:
    """Speeds that are assumed. The defaults are round numbers for nodes of eight H100 with a 200 Gbit/s port each."""

    flops: float = 300e12
    """FLOP/s that matrix products in bf16 reach on one GPU (30 % of what the data sheet says)."""
    inside: float = 200e9
    """Bytes a second that a rank sends while all GPUs of one node exchange something."""
    between: float = 20e9
    """The same over several nodes."""
    per_node: int = 8
    hop: float = 10e-6
    """Seconds that a collective adds for every level of its tree over the ranks."""
    message: float = 50e-6
    """Seconds of a small message from host to host over TCP."""
    samples: float = 11_650.0
    """Samples a second and reading process: half of what two workers collate of text (docs/data.md, measured)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds by what they go to."""

    compute: float
    communication: float
    agreement: float
    """The numbers that all hosts add up before a step, round a ring of all ranks."""
    waiting: float
    """For data that the readers have not ready."""

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.agreement + self.waiting

    @property
    def efficiency(self) -> float:
        """The share of a step that is computing: 1 would be perfect scaling."""
        return self.compute / self.total


def predict(setup: Setup, micro_batch: MicroBatch, traffic: Traffic, workers: int, machine: Machine) -> StepTime:
    """The step of a rank with so many reading processes of its own (0: it reads itself, between two steps)."""
    ranks = setup.world_size
    compute = setup.accumulation * (micro_batch.forward_flops + micro_batch.backward_flops) / machine.flops
    rate = machine.inside if ranks <= machine.per_node else machine.between
    rounds = setup.accumulation if setup.stage >= 2 else 1
    communication = (traffic.gradients + traffic.weights + traffic.backbone) / rate
    collectives = 2 * (rounds + (setup.stage > 0))
    if setup.splits_backbone:
        collectives += setup.accumulation * micro_batch.gathers
    communication += math.ceil(math.log2(ranks)) * machine.hop * collectives
    agreement = 2 * (ranks - 1) * machine.message
    reading = setup.accumulation * setup.micro_batch / (machine.samples * max(workers, 1))
    waiting = max(0.0, reading - compute - communication - agreement) if workers else reading
    return StepTime(compute, communication, agreement, waiting)
