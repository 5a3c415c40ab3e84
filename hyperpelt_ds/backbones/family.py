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
class Family:
    """Where a family of sequence-to-sequence models keeps the places that generated weights go to.

    Each function takes the whole transformers model.
    """

    model_types: tuple[str, ...]
    """`config.model_type` values of transformers."""
    sublayers: Callable[[Any], Iterator[Sublayer]]
    """Every block, the encoder's before the decoder's."""
    norms: Callable[[Any], Iterator[nn.Module]]
    """Every layer norm; its `weight`, and `bias` if it has one, are trained."""
    prefix_size: Callable[[Any], int]
    """Key heads x head size."""
    embed: Callable[[Any, Tensor], Tensor]
    """What the encoder makes of token ids (B, T) before it adds positions: (B, T, D)."""
    positions: Callable[[Any, int], Tensor | None]
    """What the encoder adds to its first T inputs, (T, D); None if it adds nothing."""
    dropout_fields: tuple[str, ...]
    """The configuration fields that hold dropout rates."""
    no_dropout_fields: tuple[str, ...] = ()
    """Fields that drop whole layers, set to 0: ranks must run the same modules in every step."""
    overflows_in_float16: bool = False
    """Whether activations of published models leave the range of float16."""
