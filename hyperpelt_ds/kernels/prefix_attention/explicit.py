"""Attention with prefixes, its scores written out in plain torch: for rows and a map where no kernel of ours runs.

The map is absorbed into query and output, so that keys and values of the prefix are never made: with
P_k[j] = W_k I_j + b_k, q . P_k[j] = (W_k^T q) . I_j + q . b_k, and likewise sum_j p_j P_v[j] = W_v sum_j p_j I_j +
b_v sum_j p_j. Any device, dropout, a bias with a gradient; scores (B, H, T, P + T') are held for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperpelt_ds.kernels.prefix_attention.records import AnyPrefix, SitePrefix, Spread, spread


def explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[AnyPrefix],
    bias: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """As `prefix_attention`, of as many key heads as query heads, with `bias` all that is added to real scores."""
    parts = [spread(prefix) for prefix in prefixes]
    query = query * scale
    real = query @ key.mT
    scores = [scores_of(part, query) for part in parts]
    scores.append(real if bias is None else real + bias)
    shares = torch.cat(scores, -1).softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32))
    shares = F.dropout(shares, dropout).to(query.dtype)
    *before, last = shares.split([*(part[0].shape[1] for part in parts), key.shape[2]], -1)
    output = last @ value
    for part, share in zip(parts, before, strict=True):
        output = output + _mixed(part, share, query)
    return output


def scores_of(part: AnyPrefix, query: Tensor) -> Tensor:
    """(B, H, T, d) -> (B, H, T, P), of a query that is scaled and a prefix that is spread."""
    batch, heads, _, size = query.shape
    first = part[0].to(query.dtype)
    folded = fold(query, len(first))
    if isinstance(part, SitePrefix):
        scores = unfold(folded @ first.unflatten(-1, (heads, size)).permute(0, 2, 3, 1), batch)
    else:
        weight, bias = part.weight.to(query.dtype).chunk(2)[0], part.bias.to(query.dtype).chunk(2)[0]
        turned = folded @ weight.view(heads, size, -1)  # (C, H, nT, E)
        scores = unfold((turned.flatten(1, 2) @ first.mT).view(*turned.shape[:3], -1), batch)
        scores = scores + (query @ bias.view(heads, size, 1))
    if part.offset is not None:
        scores = scores + part.offset.to(query.dtype)
    missing = cast(Spread, part.spread).missing
    return scores if missing is None else scores.masked_fill(missing.view(-1, 1, 1, 1), torch.finfo(query.dtype).min)


def _mixed(part: AnyPrefix, share: Tensor, query: Tensor) -> Tensor:
    """What a prefix adds to the output, from its share of the softmax: (B, H, T, P) -> (B, H, T, d)."""
    batch, heads, _, size = query.shape
    folded = fold(share, len(part[0]))
    if isinstance(part, SitePrefix):
        return unfold(folded @ part.values.to(query.dtype).unflatten(-1, (heads, size)).transpose(1, 2), batch)
    weight, bias = part.weight.to(query.dtype).chunk(2)[1], part.bias.to(query.dtype).chunk(2)[1]
    mean = (folded.flatten(1, 2) @ part.hyper.to(query.dtype)).unflatten(1, folded.shape[1:3])  # (C, H, nT, E)
    return unfold(mean @ weight.view(heads, size, -1).mT, batch) + share.sum(-1, keepdim=True) * bias.view(heads, 1, -1)


def fold(each: Tensor, conditions: int) -> Tensor:
    """(B, H, T, d) -> (C, H, B / C x T, d): the tokens of all samples of a condition in one row of queries."""
    batch, heads, length, size = each.shape
    return each.transpose(1, 2).reshape(conditions, batch // conditions * length, heads, size).transpose(1, 2)


def unfold(each: Tensor, batch: int) -> Tensor:
    """(C, H, B / C x T, d) -> (B, H, T, d)."""
    conditions, heads, length, size = each.shape
    return each.transpose(1, 2).reshape(batch, conditions * length // batch, heads, size).transpose(1, 2)
