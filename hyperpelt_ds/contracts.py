"""The records that cross between the parts of the system, and nothing else.

This file knows no part: every other module may import it, it imports only torch and the standard library.
Records that carry tensors out of a module are NamedTuples, because ZeRO-3 hooks tuples but not dataclasses.

Shape letters, used in every docstring:

    B samples              S sites of one kind       E hyper-embedding size
    C conditions           P prefix rows             D model size
    T tokens               K prefix width (heads x head size)
    R adapter bottleneck   V cells of an image       F channels of a cell
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Block(enum.IntEnum):
    """The kinds of block that a generated module is attached to; the row in the block embedding table."""

    ENCODER_SELF = 0
    DECODER_SELF = 1
    DECODER_CROSS = 2
    ENCODER_FFN = 3
    DECODER_FFN = 4

    @property
    def is_attention(self) -> bool:
        return self <= Block.DECODER_CROSS


@dataclass(frozen=True)
class Site:
    """One place in the backbone that receives generated weights. `layer` counts from 0 within its stack."""

    block: Block
    layer: int


@dataclass(frozen=True)
class Geometry:
    """All that a hypernetwork is told of a backbone: plain integers, no modules.

    `prefix_size` (K) is heads x head size, which in T5 is not always `model_size` (D). `norms` counts the
    trained layer-norm vectors, each of length D.
    """

    sites: tuple[Site, ...]
    prefix_size: int
    model_size: int
    norms: int

    @property
    def attention_sites(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.block.is_attention)

    @property
    def ffn_sites(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if not site.block.is_attention)

    @property
    def layers(self) -> int:
        """Rows of the layer embedding table: layer numbers are shared by the encoder and decoder stacks."""
        return 1 + max(site.layer for site in self.sites)


class Prefix(NamedTuple):
    """Generated key and value rows for every attention site. keys, values: (S, C, P, K)."""

    keys: Tensor
    values: Tensor


class Adapter(NamedTuple):
    """Generated parallel adapters for every FFN site: y += scale * (act(x down + down_bias) up + up_bias)."""

    down: Tensor  # (S, C, D, R)
    down_bias: Tensor  # (S, C, R)
    up: Tensor  # (S, C, R, D)
    up_bias: Tensor  # (S, C, D)
    scale: Tensor  # (S,) learned, one a site


class Branch(NamedTuple):
    """The weights generated from one source of conditions (tasks, images).

    rows (B,) int64: the condition that each sample uses, or -1 where this branch does not apply to the sample.
    """

    rows: Tensor
    prefix: Prefix | None
    adapter: Adapter | None


class Weights(NamedTuple):
    """Everything that one forward pass of the backbone is given. norms: (norms, D), or None if not trained."""

    branches: tuple[Branch, ...]
    norms: Tensor | None


@dataclass(frozen=True)
class Sample:
    """One example as it is stored in a shard, without its image's features.

    `key` is unique within a task. `item` names the source item (sentence, article, image) by which splits are
    made, so that two tasks on the same input can never leak into each other. `group` names a slice that is also
    scored alone (easy-VQA's colour and shape questions). `image` is the id of a record in a feature shard.
    `references` are all the answers that metrics compare with, where a task has several (the ten answers of a VQA
    question, the captions of an image), repeated as often as they were given; empty if `target` is the only one.
    """

    key: str
    task: str
    source: str
    target: str
    item: str = ""
    image: str | None = None
    group: str | None = None
    references: tuple[str, ...] = ()


class Batch(NamedTuple):
    """One micro-batch, sorted by condition, with the conditions named once each.

    images holds one all-zero row when no sample has an image, and image_rows is then all -1: the visual
    hypernetwork takes part in every step on every rank (ZeRO would otherwise reduce mismatched buckets).
    images and image_rows are None only when the run has no visual branch at all.
    """

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 for real tokens
    labels: Tensor  # (B, T') int64, -100 for padding
    targets: Tensor  # (N,) int64, the places of the real tokens in labels.flatten(); made on the host, so nothing waits
    tasks: Tensor  # (C,) int64, distinct rows of the task embedding table
    task_rows: Tensor  # (B,) int64, index into `tasks`
    images: Tensor | None  # (C', V, F) float, distinct images
    image_rows: Tensor | None  # (B,) int64, index into `images`, or -1
    loss_weights: Tensor  # (B,) float32; 0 for padding samples and holes
    samples: tuple[Sample, ...]  # host side, same order as the rows

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return Batch._make(part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in self)


@dataclass(frozen=True)
class StreamState:
    """Where the training stream stands: integers only, the same on every rank and for every world size.

    `samples` counts the samples committed to optimizer steps. Everything else the order needs follows from
    (seed, manifest, samples); `counts` (task name -> draws so far) is kept to spare the replay and to be checked.
    """

    seed: int
    manifest: str
    samples: int
    counts: dict[str, int]
