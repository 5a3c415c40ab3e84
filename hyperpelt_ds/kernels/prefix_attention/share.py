"""How much of a softmax goes to prefixes: for who watches a run, never on the way of a result."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import torch
from torch import Tensor

from hyperpelt_ds.kernels.prefix_attention.explicit import scores_of
from hyperpelt_ds.kernels.prefix_attention.records import AnyPrefix, spread

_SCORES = 2**24
"""About so many scores are held at a time."""


@torch.no_grad()
def prefix_share(
    query: Tensor, key: Tensor, prefixes: Sequence[AnyPrefix], bias: Tensor | None, scale: float
) -> Tensor:
    """The share of all prefix columns in the softmax of `prefix_attention`, (B, T), the mean over heads.

    query (B, H, T, d), key (B, H', T', d), bias (B or 1, H or 1, T, T') all that is added to real scores. Queries are
    looked at some at a time, of which the scores, (B, H, some, P + T'), are held.
    """
    prefixes = [spread(prefix) for prefix in prefixes]
    each = max(1, _SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    biases = repeat(None) if bias is None else bias.expand(-1, -1, query.shape[2], -1).split(each, 2)
    shares = []
    for part, added in zip(query.split(each, 2), biases, strict=False):
        shares.append(_share(part, key, prefixes, added, scale))
    return torch.cat(shares, 1)


def _share(query: Tensor, key: Tensor, prefixes: Sequence[AnyPrefix], bias: Tensor | None, scale: float) -> Tensor:
    batch, heads, length, size = query.shape
    each = heads // key.shape[1]
    query = query.reshape(batch, key.shape[1], each * length, size) * scale
    prefixed = torch.cat([scores_of(prefix, query) for prefix in prefixes], -1)
    real = (query @ key.mT).view(batch, heads, length, -1)
    sums = torch.logsumexp(prefixed.float(), -1).view(batch, heads, length)
    others = torch.logsumexp((real if bias is None else real + bias).float(), -1)
    return torch.sigmoid(sums - others).mean(1)
