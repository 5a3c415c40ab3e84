"""What a model family's file states: facts about its modules, no logic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hyperpelt_ds.contracts import Site


@dataclass(frozen=True)
class Sublayer:
    """One attention or feed-forward block of the model."""

    site: Site
    first: nn.Module
    """The module whose input is the block's."""
    last: nn.Module
    """The module whose output is the block's, before the residual is added."""
    linears: dict[str, nn.Linear]
    """Its linear maps: query, key, value and output, or up and down, with gate where the model has a gated one."""
    attention: nn.Module | None = None
    """The module that transformers hands to the attention function."""


@dataclass(frozen=True)
class Layout:
    """How a batch's sources and targets become the input of a model.

    Sources come as vectors (B, T, D) with a mask (B, T), 1 for real ones, wherever these stand.
    """

    auto_class: Any
    """The class of transformers that loads such a model with the layer that gives logits."""
    with_labels: Callable[[Any, Tensor, Tensor, Tensor], tuple[dict[str, Tensor], Tensor | None]]
    """(model, sources, mask, labels (B, T')): what the model is called with, and the places (B, T') in its flattened
    output of what predicts each label; None where its output is in the labels' order already."""
    prompt: Callable[[Tensor, Tensor], dict[str, Tensor]]
    """(sources, mask): what `generate` is called with. It then returns new tokens only, after at most one to start."""
    tokenizer: Callable[[Any], Any]
    """The published tokenizer, made fit for sources and targets."""
    one_sequence: bool
    """Whether source, image tokens and target share one sequence, and its positions."""


@dataclass(frozen=True)
class Family:
    """Where a family of language models keeps the places that generated weights go to.

    Each function takes the whole transformers model.
    """

    model_types: tuple[str, ...]
    """`config.model_type` values of transformers."""
    layout: Layout
    """Whether it has an encoder, and what follows from that."""
    sublayers: Callable[[Any], Iterator[Sublayer]]
    """Every block, the encoder's before the decoder's."""
    blocks: Callable[[Any], Iterator[nn.Module]]
    """Every layer of both stacks: the modules that hold nearly all weights and run one after the other."""
    norms: Callable[[Any], Iterator[nn.Module]]
    """Every layer norm of the model's size; its `weight`, and `bias` if it has one, are trained."""
    prefix_size: Callable[[Any], int]
    """Key heads x head size."""
    embed: Callable[[Any, Tensor], Tensor]
    """What becomes of a source's token ids (B, T) before positions are added: (B, T, D)."""
    positions: Callable[[Any], nn.Module | None]
    """The module whose output ((B,) T, D) is added to a source's vectors; None if there is none."""
    dropout_fields: tuple[str, ...]
    """The configuration fields that hold dropout rates."""
    no_dropout_fields: tuple[str, ...] = ()
    """Fields that drop whole layers, set to 0: ranks must run the same modules in every step."""
    overflows_in_float16: bool = False
    """Whether activations of published models leave the range of float16."""
