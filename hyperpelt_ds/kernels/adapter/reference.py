"""Adapters as their formula reads: the oracle of the other backends, on any device and type, differentiable twice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from hyperpelt_ds.kernels.adapter import SiteAdapter

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda x: x,
}

NORM_EPSILON = 1e-5


def adapter(x: Tensor, residual: Tensor, adapters: Sequence[SiteAdapter], activation: str) -> Tensor:
    """residual + sum over branches of scale * norm(act(x down + down_bias) up + up_bias), weights copied by sample."""
    for part in adapters:
        # A sample without a condition reads row 0 and is scaled by 0.
        rows = part.users.ids.clamp(min=0)
        used = (part.users.ids >= 0).view(-1, 1, 1)
        if part.users.lengths is not None:
            used = used & (torch.arange(x.shape[1], device=x.device) < part.users.lengths.unsqueeze(1)).unsqueeze(2)
        hidden = ACTIVATIONS[activation](
            torch.baddbmm(_vector(part.down_bias, rows), x, part.down.index_select(0, rows))
        )
        added = torch.baddbmm(_vector(part.up_bias, rows), hidden, part.up.index_select(0, rows))
        if part.gain is not None and part.shift is not None:
            added = F.layer_norm(added, added.shape[-1:], eps=NORM_EPSILON)
            added = added * _vector(part.gain, rows) + _vector(part.shift, rows)
        residual = residual + (part.scale * used).to(x.dtype) * added
    return residual


def _vector(each: Tensor, rows: Tensor) -> Tensor:
    """(C, N) -> (B, 1, N): the same vector for all tokens of a sample."""
    return each.index_select(0, rows).unsqueeze(1)
