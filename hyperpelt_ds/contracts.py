"""The records that cross between the parts of the system, and nothing else.

This file knows no part: every other module may import it, it imports only the standard library (torch
only where it computes: who reads shards or asks a command for help should not wait for it).
Records that carry tensors out of a module are NamedTuples, because ZeRO-3 hooks tuples but not dataclasses.

Shape letters, used in every docstring:

    B samples              S sites of one kind       E hyper-embedding size
    C conditions           P prefix rows             D model size
    T tokens               K prefix width (heads x head size)
    R adapter bottleneck   V cells of an image       F channels of a cell
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TRAIN, VALIDATION = "train", "validation"
"""Names of the splits that training reads."""


class Block(enum.IntEnum):
    """The kinds of block that a generated module is attached to."""

    ENCODER_SELF = 0
    DECODER_SELF = 1
    DECODER_CROSS = 2
    ENCODER_FFN = 3
    DECODER_FFN = 4

    @property
    def is_attention(self) -> bool:
        return self <= Block.DECODER_CROSS

    @property
    def in_encoder(self) -> bool:
        return self in (Block.ENCODER_SELF, Block.ENCODER_FFN)


@dataclass(frozen=True)
class Site:
    """One place in the backbone that receives generated weights. `layer` counts from 0 within its stack."""

    block: Block
    layer: int


@dataclass(frozen=True)
class Projection:
    """The linear maps of one name (query, value, up, ...) in all blocks that have one: targets of low-rank deltas."""

    name: str
    sites: tuple[Site, ...]
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Geometry:
    """All that a hypernetwork is told of a backbone and of what is to be put beside it: plain integers, no modules.

    The encoder's sites come before the decoder's in every tuple; a kind of module that the run does not have has no
    sites. `prefix_size` (K) is key heads x head size, which in T5 is not always `model_size` (D). `norms` counts the
    trained layer-norm vectors, each of length D.
    """

    prefix_sites: tuple[Site, ...]
    adapter_sites: tuple[Site, ...]
    projections: tuple[Projection, ...]
    prefix_size: int
    model_size: int
    norms: int

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site that receives anything, once."""
        lora = [site for projection in self.projections for site in projection.sites]
        return tuple(dict.fromkeys([*self.prefix_sites, *self.adapter_sites, *lora]))

    def stack(self, encoder: bool) -> Geometry:
        """The part of one stack, for a hypernetwork of its own."""

        def own(sites: tuple[Site, ...]) -> tuple[Site, ...]:
            return tuple(site for site in sites if site.block.in_encoder == encoder)

        projections = tuple(dataclasses.replace(p, sites=own(p.sites)) for p in self.projections)
        return dataclasses.replace(
            self, prefix_sites=own(self.prefix_sites), adapter_sites=own(self.adapter_sites), projections=projections
        )


@dataclass(frozen=True)
class Conditions:
    """What weights can be made from in a run: `tasks` many ids, images of `cells` x `channels` features, and a frozen
    vector for the description of every task, (tasks, F'). None where the run has no such thing."""

    tasks: int
    cells: int | None = None
    channels: int | None = None
    descriptions: Tensor | None = None


class Prefix(NamedTuple):
    """Key and value rows for every attention site that has a prefix. keys, values: (S, C, P, K).

    offset (S,), or None for 0, is added to the scores of the prefix columns.
    """

    keys: Tensor
    values: Tensor
    offset: Tensor | None = None


class PrefixRows(NamedTuple):
    """A Prefix before it is made: keys and values are the halves of rows weight^T + bias.

    rows (S, C, P, E). weight (1 or S, 2K, E) and bias (1 or S, 2K): one map for all sites, or one each. Where every
    sample has its own condition this is E / 2K of the memory, and attention can do with it alone.
    """

    rows: Tensor
    weight: Tensor
    bias: Tensor
    offset: Tensor | None = None

    def materialised(self) -> Prefix:
        """Keys and values, each (S, C, P, K), of all sites in one product."""
        import torch

        if len(self.weight) == 1:
            made = torch.nn.functional.linear(self.rows, self.weight[0], self.bias[0])
        else:
            flat = torch.baddbmm(self.bias.unsqueeze(1), self.rows.flatten(1, 2), self.weight.mT)
            made = flat.unflatten(1, self.rows.shape[1:3])
        keys, values = made.chunk(2, dim=-1)
        return Prefix(keys, values, self.offset)


class Adapter(NamedTuple):
    """Bottleneck adapters: y += scale * norm(act(x down + down_bias) up + up_bias).

    `norm` is a layer norm with gain and shift, or nothing where these are None. Whether x is the input of the block
    (parallel) or its output (sequential) is the backbone's business.
    """

    down: Tensor  # (S, C, D, R)
    down_bias: Tensor  # (S, C, R)
    up: Tensor  # (S, C, R, D)
    up_bias: Tensor  # (S, C, D)
    scale: Tensor  # (S,)
    gain: Tensor | None = None  # (S, C, D)
    shift: Tensor | None = None  # (S, C, D)


class LowRank(NamedTuple):
    """Low-rank deltas of one Projection: y += x down up, any scale within `up`. I inputs, O outputs, r the rank."""

    down: Tensor  # (S, C, I, r)
    up: Tensor  # (S, C, r, O)


class Unmade(NamedTuple):
    """Adapters, or the low-rank deltas of one projection, that are to be made `at_once` many sites at a time.

    The numbers of all sites and conditions are rows weight^T + bias. `shapes` are what the N of a site and condition
    hold one after the other: an Adapter's tensors without scale, or a LowRank's down and up. What they add is to be
    multiplied by scale.
    """

    rows: Tensor  # (S, C, E)
    weight: Tensor  # (N, E)
    bias: Tensor  # (N,)
    scale: Tensor  # (S,)
    shapes: tuple[tuple[int, ...], ...]
    at_once: int


class Branch(NamedTuple):
    """The weights made from one source of conditions (tasks, images, descriptions), by kind of module.

    rows (B,) int64: the condition that each sample uses, or -1 where this branch does not apply to the sample.
    lora has one entry for each of the geometry's projections, in their order. Where a stack's weights are Unmade and
    the other stack has a hypernetwork of its own, adapters and deltas are both stacks', the encoder's first.
    """

    rows: Tensor
    prefix: Prefix | PrefixRows | None
    adapter: Adapter | Unmade | tuple[Adapter | Unmade, ...] | None
    lora: tuple[LowRank | Unmade | tuple[LowRank | Unmade, ...], ...] | None = None


class Tokens(NamedTuple):
    """Images as further tokens of the encoder. values (C, V, D); rows (B,) int64, -1 for a sample without image."""

    values: Tensor
    rows: Tensor


class Weights(NamedTuple):
    """Everything that one forward pass of the backbone is given. norms: (norms, D), or None if not trained."""

    branches: tuple[Branch, ...]
    norms: Tensor | None
    tokens: Tokens | None = None


class Sample(NamedTuple):
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
        from torch import Tensor

        return Batch._make(part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in self)


@dataclass(frozen=True)
class Hole:
    """A sample that was drawn and could not be used: its slot stays in the batch with weight 0, so nothing else moves.

    position counts the run's draws from 0, index the samples of the task's split.
    """

    position: int
    task: str
    split: str
    index: int
    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class StreamState:
    """Where the training stream stands: integers only, the same on every rank and for every world size.

    `samples` counts the samples committed to optimizer steps. Everything else the order needs follows from
    (seed, data, lanes, global batch, samples). `data` names the content of each task; `counts` (task name -> draws so
    far in each of its lanes) is kept to spare the replay and to be checked.
    """

    seed: int
    data: dict[str, str]
    lanes: int
    global_batch: int
    samples: int
    counts: dict[str, list[int]]
