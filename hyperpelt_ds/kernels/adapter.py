"""Bottleneck adapters of a mixed batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}

NORM_EPSILON = 1e-5


class SiteAdapter(NamedTuple):
    """One branch's adapters at one site, with the condition of each sample in `rows` (B,), -1 for none."""

    down: Tensor  # (C, D, R)
    down_bias: Tensor  # (C, R)
    up: Tensor  # (C, R, D)
    up_bias: Tensor  # (C, D)
    scale: Tensor  # ()
    rows: Tensor  # (B,) int64
    gain: Tensor | None = None  # (C, D)
    shift: Tensor | None = None  # (C, D)


def adapter(x: Tensor, residual: Tensor, adapters: Sequence[SiteAdapter], activation: str) -> Tensor:
    """residual + sum over branches of scale * norm(act(x down + down_bias) up + up_bias).

    `norm` is a layer norm with the branch's gain and shift where it has them (HyperFormer), else nothing.
    x, residual (B, T, D) -> (B, T, D). A sample whose row is -1 in a branch gets nothing from that branch.
    Paper section 4 (adapter beside the feed-forward block); the activation is one of ACTIVATIONS.
    """
    act = ACTIVATIONS[activation]
    for part in adapters:
        # One weight set a sample, never one a token; a sample without a condition reads row 0 and is scaled by 0.
        rows = part.rows.clamp(min=0)
        factor = (part.scale * (part.rows >= 0)).to(x.dtype).view(-1, 1, 1)
        hidden = act(torch.baddbmm(_vector(part.down_bias, rows), x, part.down.index_select(0, rows)))
        added = torch.baddbmm(_vector(part.up_bias, rows), hidden, part.up.index_select(0, rows))
        if part.gain is not None and part.shift is not None:
            added = F.layer_norm(added, added.shape[-1:], eps=NORM_EPSILON)
            added = added * _vector(part.gain, rows) + _vector(part.shift, rows)
        residual = residual + factor * added
    return residual


def _vector(each: Tensor, rows: Tensor) -> Tensor:
    """(C, N) -> (B, 1, N): the same vector for all tokens of a sample."""
    return each.index_select(0, rows).unsqueeze(1)
