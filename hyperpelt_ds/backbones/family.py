"""What a model family's file states: facts about its modules, no logic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from hyperpelt_ds.contracts import Site


@dataclass(frozen=True)
class Family:
    """Where a family of sequence-to-sequence models keeps the places that generated weights go to.

    Each function takes the whole transformers model.
    """

    model_types: tuple[str, ...]
    """`config.model_type` values of transformers."""
    attentions: Callable[[Any], Iterator[tuple[Site, nn.Module]]]
    """Every attention block: the module that transformers hands to the attention function."""
    ffns: Callable[[Any], Iterator[tuple[Site, nn.Module, nn.Module]]]
    """Every feed-forward block: the module whose input is the block's, and the module whose output is the block's."""
    norms: Callable[[Any], Iterator[nn.Module]]
    """Every layer norm; its `weight`, and `bias` if it has one, are trained."""
    prefix_size: Callable[[Any], int]
    """Heads x head size."""
    dropout_fields: tuple[str, ...]
    """The configuration fields that hold dropout rates."""
    no_dropout_fields: tuple[str, ...] = ()
    """Fields that drop whole layers, set to 0: ranks must run the same modules in every step."""
