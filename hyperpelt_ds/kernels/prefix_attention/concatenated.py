"""Attention with prefixes by torch's own kernels: keys and values of both kinds are put one after the other.

It needs a copy of every key and value, and knows nothing that torch's attention does not: dropout, a bias with a
gradient, any device. Where a prefix comes as rows and a map, its keys and values are made first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperpelt_ds.kernels.prefix_attention.records import SitePrefix, Spread, spread

Once = Callable[..., Any]
"""once(make, *given): make(*given), made anew only for other objects than before."""


def concatenated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[SitePrefix],
    bias: Tensor | None,
    scale: float,
    dropout: float,
    once: Once | None = None,
) -> Tensor:
    """As `prefix_attention`, with `bias` (B or 1, H or 1, T, T') all that is added to the scores of real keys."""
    parts = [cast(SitePrefix, spread(prefix)) for prefix in prefixes]
    added = _added(parts, bias, query, key.shape[2], once)
    key, value = join(key, value, parts)
    return attention(query, key, value, added, dropout, scale)


def attention(
    query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, dropout: float, scale: float | None
) -> Tensor:
    """torch's own, of query (B, H, T, d), key and value (B, H', T', d), and what is added to scores or None.

    Heads that share a key get copies of it where something is added: for both together torch before 2.14 has no kernel
    on most devices but the one that holds all scores in float32. One query a sample needs no copy: those that share a
    key are so many queries of one head.
    """
    batch, heads, length, size = query.shape
    group = heads // key.shape[1]
    if group == 1 or added is None:
        return F.scaled_dot_product_attention(query, key, value, added, dropout, scale=scale, enable_gqa=group > 1)
    if length == 1:
        rows = query.reshape(batch, -1, group, size)
        own = added.expand(-1, heads, -1, -1).reshape(len(added), -1, group, added.shape[3])
        return F.scaled_dot_product_attention(rows, key, value, own, dropout, scale=scale).reshape(query.shape)
    key, value = (part.repeat_interleave(group, 1) for part in (key, value))
    return F.scaled_dot_product_attention(query, key, value, added, dropout, scale=scale)


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


def _added(
    parts: Sequence[SitePrefix], bias: Tensor | None, query: Tensor, length: int, once: Once | None
) -> Tensor | None:
    """What is added to all scores (B or 1, H or 1, T, P + T'): nothing for a prefix column but its offset, and for
    samples without that prefix what hides it. Where it is the same for many sites they share it."""
    offsets = [part.offset for part in parts]
    if bias is None and all(part.offset is None and _missing(part) is None for part in parts):
        return None
    facts = [fact for part in parts for fact in (part.keys.shape[1], _missing(part))]
    if once is not None and bias is not None and not bias.requires_grad and not any(o is not None for o in offsets):
        shared: Tensor = once(_beside, bias, *facts)
        return shared
    if bias is None:
        bias = query.new_zeros((1, 1, query.shape[2], length))
    return _beside(bias, *facts, offsets=offsets)


def _beside(bias: Tensor, *facts: Any, offsets: Sequence[Tensor | None] | None = None) -> Tensor:
    """bias with columns before it for prefixes: `facts` are the rows of each, and the samples without it or None."""
    columns = []
    for rows, missing, offset in zip(facts[::2], facts[1::2], offsets or [None] * len(facts[::2]), strict=True):
        added = bias.new_zeros(()) if offset is None else offset.to(bias.dtype)
        if missing is not None:
            added = torch.where(missing.view(-1, 1, 1, 1), torch.finfo(bias.dtype).min, added)
        columns.append(added.expand(max(added.shape[:1], default=1), *bias.shape[1:3], rows))
    samples = max(len(column) for column in [*columns, bias])
    return torch.cat([column.expand(samples, -1, -1, -1) for column in [*columns, bias]], dim=-1)


def _missing(part: SitePrefix) -> Tensor | None:
    return cast(Spread, part.spread).missing
