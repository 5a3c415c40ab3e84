"""How far the real tokens of every sample go, for what may leave out the padding behind them.

Only where targets are known: in generation a sample's tokens come one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Ends(NamedTuple):
    """One past the last real token of every sample, (B,) int32, in each stack."""

    encoder: Tensor
    decoder: Tensor


def ends_of(inputs: Mapping[str, Tensor], labels: Tensor, one_sequence: bool) -> Ends:
    """`inputs` are what a model is called with for `labels` (B, T'), padded with -100.

    Image tokens stand behind a source's padding: where a sample has them, its padding is not left out.
    """
    whole = _end(inputs["attention_mask"] != 0)
    return Ends(whole, whole if one_sequence else _end(labels >= 0))


def _end(real: Tensor) -> Tensor:
    places = torch.arange(1, real.shape[1] + 1, dtype=torch.int32, device=real.device)
    return (places * real).amax(1)
