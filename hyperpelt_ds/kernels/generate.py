"""Weights from hyper-embeddings, for every site and condition at once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def generate(hyper: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One product for all sites: (S, C, ..., E) x (N, E) + (N,) -> (S, C, ..., N).

    `N` is everything a module kind needs at one site (paper section 4: h^P and h^A are single linear maps).
    Conditions must come deduplicated: cost and memory grow with C, not with the batch.
    """
    return F.linear(hyper, weight, bias)
