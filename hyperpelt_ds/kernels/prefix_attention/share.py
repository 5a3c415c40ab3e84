"""How much of a softmax goes to prefixes: for who watches a run, never on the way of a result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperpelt_ds.kernels.prefix_attention.explicit import scores_of
from hyperpelt_ds.kernels.prefix_attention.records import AnyPrefix, spread


@torch.no_grad()
def prefix_share(
    query: Tensor, key: Tensor, prefixes: Sequence[AnyPrefix], bias: Tensor | None, scale: float
) -> Tensor:
    """The share of all prefix columns in the softmax of `prefix_attention`, (B, T), the mean over heads.

    query (B, H, T, d), key (B, H', T', d), bias (B or 1, H or 1, T, T') all that is added to real scores. Scores are
    held at once, (B, H, T, P + T').
    """
    batch, heads, length, size = query.shape
    each = heads // key.shape[1]
    query = query.reshape(batch, key.shape[1], each * length, size) * scale
    prefixed = torch.cat([scores_of(spread(prefix), query) for prefix in prefixes], -1)
    real = (query @ key.mT).view(batch, heads, length, -1)
    sums = torch.logsumexp(prefixed.float(), -1).view(batch, heads, length)
    others = torch.logsumexp((real if bias is None else real + bias).float(), -1)
    return torch.sigmoid(sums - others).mean(1)
