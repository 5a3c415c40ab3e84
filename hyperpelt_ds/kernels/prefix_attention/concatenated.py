"""Attention with prefixes by torch's own kernels: keys and values of both kinds are put one after the other.

It needs a copy of every key and value, and knows nothing that torch's attention does not: dropout, a bias with a
gradient, any device. Where a prefix comes as rows and a map, its keys and values are made first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperpelt_ds.kernels.prefix_attention.records import SitePrefix, Spread, spread


def concatenated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[SitePrefix],
    bias: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """As `prefix_attention`, with `bias` (B or 1, H or 1, T, T') all that is added to the scores of real keys."""
    parts = [cast(SitePrefix, spread(prefix)) for prefix in prefixes]
    added = _added(parts, bias, query, key.shape[2])
    grouped = query.shape[1] != key.shape[1]
    key, value = join(key, value, parts)
    return F.scaled_dot_product_attention(query, key, value, added, dropout, scale=scale, enable_gqa=grouped)


def join(key: Tensor, value: Tensor, parts: Sequence[SitePrefix]) -> tuple[Tensor, Tensor]:
    """The keys and values of prefixes that are spread, and after them key and value (B, H, T', d)."""
    batch, heads, _, size = key.shape
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for part in parts:
        for made, rows in ((keys, part.keys), (values, part.values)):
            split = rows.unflatten(-1, (heads, size)).transpose(1, 2).to(key.dtype)
            each = batch // len(split)
            made.append(split.repeat_interleave(each, 0) if 1 < each < batch else split.expand(batch, -1, -1, -1))
    return torch.cat([*keys, key], dim=2), torch.cat([*values, value], dim=2)


def _added(parts: Sequence[SitePrefix], bias: Tensor | None, query: Tensor, length: int) -> Tensor | None:
    """What is added to all scores (B or 1, H or 1, T, P + T'): nothing for a prefix column but its offset, and for
    samples without that prefix what hides it."""
    if bias is None and all(part.offset is None and _missing(part) is None for part in parts):
        return None
    if bias is None:
        bias = query.new_zeros((1, 1, query.shape[2], length))
    columns = []
    for part in parts:
        added = bias.new_zeros(()) if part.offset is None else part.offset.to(bias.dtype)
        missing = _missing(part)
        if missing is not None:
            added = torch.where(missing.view(-1, 1, 1, 1), torch.finfo(bias.dtype).min, added)
        columns.append(added.expand(max(added.shape[:1], default=1), *bias.shape[1:3], part.keys.shape[1]))
    samples = max(len(column) for column in [*columns, bias])
    return torch.cat([column.expand(samples, -1, -1, -1) for column in [*columns, bias]], dim=-1)


def _missing(part: SitePrefix) -> Tensor | None:
    return cast(Spread, part.spread).missing
