"""Attention in which every sample has its own generated rows before its keys and values.

What each way of computing it is for: `merged` on the devices of MERGED, without a copy; `concatenated` elsewhere, and
where torch's own attention does more than parts can (dropout, a trained bias); `explicit` there for rows and a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperpelt_ds.kernels.prefix_attention.checks import check
from hyperpelt_ds.kernels.prefix_attention.concatenated import Once, attention, concatenated, join
from hyperpelt_ds.kernels.prefix_attention.explicit import explicit
from hyperpelt_ds.kernels.prefix_attention.flash import CPU, CUDA, Flash
from hyperpelt_ds.kernels.prefix_attention.merged import merged
from hyperpelt_ds.kernels.prefix_attention.records import (
    AnyPrefix,
    SitePrefix,
    SiteRows,
    Spread,
    spread,
    spread_of,
)
from hyperpelt_ds.kernels.prefix_attention.reference import reference
from hyperpelt_ds.kernels.prefix_attention.share import prefix_share

__all__ = [
    "CPU",
    "CUDA",
    "MERGED",
    "AnyPrefix",
    "Flash",
    "SitePrefix",
    "SiteRows",
    "Spread",
    "attention",
    "concatenated",
    "explicit",
    "join",
    "merged",
    "prefix_attention",
    "prefix_share",
    "reference",
    "score_bias",
    "spread",
    "spread_of",
]

MERGED = {"cpu": CPU}
"""By device, the kernels whose results are merged. CUDA joins when it has run and won (docs/kernels.md)."""


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[AnyPrefix],
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    once: Once | None = None,
) -> Tensor:
    """softmax(scale * q [P_k; K]^T + [offset; bias]) [P_v; V], every sample with the prefix rows of its condition.

    query (B, H, T, d), key and value (B, H', T', d), H' x d = K, where H is a multiple of H' (grouped queries).
    mask (B or 1, 1, T, T') bool, True where a query may look, never None when it must not look everywhere: with
    prefix rows present, causality cannot be left to a flag. bias (B or 1, H or 1, T, T') is added to the scores of real
    keys; prefix columns get none but their offset and are never masked, except for samples whose row is -1 (paper
    section 4).
    once: remembers what it made for the same tensors, so that calls with one bias share what is made of it.
    Returns (B, H, T, d). Raises KernelShapeError and KernelDtypeError for arguments that do not fit, naming them; of
    prefixes that come with their `spread`, prepared once for many calls, it takes the fit for granted.
    """
    group = query.shape[1] // key.shape[1]
    if not prefixes:
        hidden = mask if bias is None else score_bias(mask, bias, query.dtype)
        return attention(query, key, value, hidden, dropout, scale)
    if any(prefix.spread is None for prefix in prefixes):
        check(query, key, value, prefixes, mask, bias)
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as it does for torch's own attention
        query, key, value = (part.to(torch.get_autocast_dtype(device)) for part in (query, key, value))
    if mask is not None or (bias is not None and bias.dtype != query.dtype):
        bias = score_bias(mask, bias, query.dtype)
    flash = MERGED.get(device)
    if flash is not None and not _merges(flash, query, prefixes, bias, dropout):
        flash = None
    if flash is None or not _merging_pays(flash, query, key, prefixes):
        made = [prefix for prefix in prefixes if isinstance(prefix, SitePrefix)]
        if len(made) == len(prefixes):
            return concatenated(query, key, value, made, bias, scale, dropout, once)
    shape = query.shape
    if group > 1:  # queries that share a key are so many more queries of one head
        query = query.reshape(shape[0], key.shape[1], -1, shape[3])
        if bias is not None and bias.shape[1] == 1:
            bias = bias.repeat(1, 1, group, 1)
        elif bias is not None:
            bias = bias.reshape(len(bias), key.shape[1], -1, bias.shape[3])
    if flash is not None:
        return merged(flash, query, key, value, prefixes, bias, scale).reshape(shape)
    return explicit(query, key, value, prefixes, bias, scale, dropout).reshape(shape)


def _merges(flash: Flash, query: Tensor, prefixes: Sequence[AnyPrefix], bias: Tensor | None, dropout: float) -> bool:
    """Whether the kernels do all that a call asks for."""
    sizes = [query.shape[3], *(prefix.hyper.shape[2] for prefix in prefixes if isinstance(prefix, SiteRows))]
    return dropout == 0 and not (bias is not None and bias.requires_grad) and flash.takes(query.dtype, sizes)


def _merging_pays(flash: Flash, query: Tensor, key: Tensor, prefixes: Sequence[AnyPrefix]) -> bool:
    """Always in generation, where a token waits for copies."""
    rows = sum(prefix[0].shape[1] for prefix in prefixes)
    return not torch.is_grad_enabled() or flash.pays(query.shape[2], key.shape[2], rows)


def score_bias(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores of real keys: the bias, or a number that hides where a query may not look.

    None for nothing. Not minus infinity: what a query that sees no key gets must stay a number. Half the lowest, since
    kernels that count in powers of two multiply it by 1.44.
    """
    lowest = torch.finfo(dtype).min / 2
    if bias is not None:
        if bias.dtype != dtype:
            bias = bias.to(dtype).clamp(min=lowest)  # what is lowest in one type may be minus infinity in another
        return bias if mask is None else bias.masked_fill(~mask, lowest)
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)
