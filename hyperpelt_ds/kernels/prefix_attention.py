"""Attention with generated key and value rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SitePrefix(NamedTuple):
    """One branch's prefix at one site, with the condition of each sample in `rows` (B,), -1 for none."""

    keys: Tensor  # (C, P, K)
    values: Tensor  # (C, P, K)
    rows: Tensor  # (B,) int64
    offset: Tensor | None = None  # (), added to the scores of these columns; None for 0


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[SitePrefix],
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale * q [P_k; K]^T + [offset; bias]) [P_v; V], every sample with the prefix rows of its condition.

    query (B, H, T, d), key and value (B, H', T', d), H' x d = K, where H is a multiple of H' (grouped queries).
    mask (B or 1, 1, T, T') bool, True where a query may look, never None when it must not look everywhere: with
    prefix rows present, causality cannot be left to a flag. bias (B or 1, H, T, T') is added to the scores of real
    keys; prefix columns get none but their offset and are never masked, except for samples whose row is -1 (paper
    section 4).
    Returns (B, H, T, d).
    """
    grouped = query.shape[1] != key.shape[1]
    if not prefixes:
        mask = _scores(mask, bias, query)
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale, enable_gqa=grouped)
    batch, heads, _, size = key.shape
    length = query.shape[2]
    keys, values, visible, offsets = [], [], [], []
    for prefix in prefixes:
        rows = prefix.rows.clamp(min=0)
        shape = (batch, -1, heads, size)
        keys.append(prefix.keys.index_select(0, rows).view(shape).transpose(1, 2))
        values.append(prefix.values.index_select(0, rows).view(shape).transpose(1, 2))
        columns = prefix.keys.shape[1]
        visible.append((prefix.rows >= 0).view(-1, 1, 1, 1).expand(-1, 1, length, columns))
        offsets.append((query.new_zeros(()) if prefix.offset is None else prefix.offset).expand(columns))
    if mask is None:
        mask = query.new_ones((1, 1, 1, key.shape[2]), dtype=torch.bool)
    mask = torch.cat([*visible, mask.expand(batch, 1, length, -1)], dim=-1)
    if bias is None and any(prefix.offset is not None for prefix in prefixes):
        bias = query.new_zeros((1, 1, 1, key.shape[2]))
    if bias is not None:
        added = torch.cat(offsets).to(bias.dtype).expand(*bias.shape[:-1], -1)
        bias = torch.cat([added, bias], dim=-1)
    return F.scaled_dot_product_attention(
        query,
        torch.cat([*keys, key], dim=2),
        torch.cat([*values, value], dim=2),
        _scores(mask, bias, query),
        dropout,
        scale=scale,
        enable_gqa=grouped,
    )


def _scores(mask: Tensor | None, bias: Tensor | None, query: Tensor) -> Tensor | None:
    """What is added to the scores, or a bool mask where there is no bias."""
    if bias is None:
        return mask
    bias = bias.to(query.dtype)
    return bias if mask is None else bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
