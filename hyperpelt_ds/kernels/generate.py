"""Weights from hyper-embeddings, for every site and condition at once, and how they lie in one packed row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from hyperpelt_ds.kernels.errors import KernelDtypeError, KernelShapeError

ROWS_A_FLUSH = 4
"""Rows of weights, for every number of a hyper-embedding, that make the gradient of the generating map cheap: it is
(N, E) and is written anew for every chunk of sites, beside C x N for each of the chunk's sites."""


def generate(hyper: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One product for all sites: (S, C, ..., E) x (N, E) + (N,) -> (S, C, ..., N).

    `N` is everything a module kind needs at one site (paper section 4: h^P and h^A are single linear maps).
    Conditions must come deduplicated: cost and memory grow with C, not with the batch. Raises KernelShapeError or
    KernelDtypeError that names the argument.
    """
    rows = weight.shape[0]
    for name, part, shape in (("weight", weight, (rows, hyper.shape[-1])), ("bias", bias, (rows,))):
        if tuple(part.shape) != shape:
            raise KernelShapeError(f"{name}: expected shape {shape}, got {tuple(part.shape)}")
        if part.device != hyper.device:
            raise KernelDtypeError(f"{name}: expected a tensor on {hyper.device} as hyper is, got one on {part.device}")
    return F.linear(hyper, weight, bias)


def unpack(packed: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The tensors (..., *shape) that packed rows (..., N) hold one after the other: views, which every op takes as they
    are."""
    parts = packed.split([math.prod(shape) for shape in shapes], dim=-1)
    return [part.unflatten(-1, shape) if len(shape) > 1 else part for part, shape in zip(parts, shapes, strict=True)]


def sites_at_once(shape: Sequence[int], share: float | None) -> int:
    """How many sites of hyper-embeddings (S, C, E) to generate together where only `share` of the weights may be there
    (None: all).

    Never fewer than 4 E / C, below which the gradient of the map would cost more than the weights.
    """
    sites, conditions, hyper = shape
    if share is None or share >= 1:
        return sites
    return min(sites, max(math.ceil(ROWS_A_FLUSH * hyper / max(conditions, 1)), int(share * sites)))
