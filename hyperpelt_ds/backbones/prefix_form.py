"""In which of its two forms a generated prefix goes to each attention site, decided where all lengths are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hyperpelt_ds.contracts import Prefix, PrefixRows
from hyperpelt_ds.kernels.prefix_attention import MERGED, AnyPrefix, SitePrefix, SiteRows

Form = Literal["auto", "materialised", "absorbed"]
PER_QUERY = 1.25
"""Rows of keys and values that cost as much to make and use as one query costs without them."""
TOKEN_ALONE = 8
"""Queries that a token which is generated alone stands for: it waits for memory rather than for products. Measured on
one thread, for a site and token of 16 samples: keys and values of 16 rows 36 us, of 128 rows 102, of 256 rows 210, of
784 rows 607; without them 124, 146, 138 and 201."""


def by_site(prefix: Prefix | PrefixRows | None, rows: Tensor, lengths: Sequence[int], form: Form) -> list[AnyPrefix]:
    """A branch's prefix at every site, for samples whose conditions are `rows` (B,); [] without a prefix.

    `lengths` are the queries that a sample has at each site at a time. Tensors (S, ...) are unbound once for all sites:
    taking `tensor[site]` at every site would fill and add a whole (S, ...) gradient for each of them (7 % of a training
    step on a CPU, measured on the demo's shapes).
    """
    if prefix is None:
        return []
    offsets = prefix.offset.unbind() if prefix.offset is not None else [None] * len(prefix[0])
    if isinstance(prefix, Prefix):
        return _made(prefix, rows, offsets)
    if form == "auto":
        # Where parts are not merged, attention to a map rounds its scores to the type: in bfloat16 that is two to four
        # times the error of keys and values that are made (measured on a CPU).
        absorbed = [rows.device.type in MERGED and _pays(prefix.rows, len(rows), length) for length in lengths]
    else:
        absorbed = [form == "absorbed"] * len(lengths)
    if not any(absorbed):
        return _made(prefix.materialised(), rows, offsets)
    hyper, maps = prefix.rows.unbind(), list(zip(prefix.weight.unbind(), prefix.bias.unbind(), strict=True))
    maps = maps if len(maps) > 1 else maps * len(hyper)
    found: list[AnyPrefix] = [SiteRows(h, *m, rows, o) for h, m, o in zip(hyper, maps, offsets, strict=True)]
    others = [site for site, absorbs in enumerate(absorbed) if not absorbs]
    if others:  # still in one product
        several = len(prefix.weight) > 1
        weight, bias = ((torch.stack([m[i] for m in (maps[s] for s in others)]) if several else whole)
                        for i, whole in enumerate(prefix[1:3]))  # fmt: skip
        made = PrefixRows(torch.stack([hyper[s] for s in others]), weight, bias).materialised()
        for site, one in zip(others, _made(made, rows, [offsets[s] for s in others]), strict=True):
            found[site] = one
    return found


def _made(prefix: Prefix, rows: Tensor, offsets: Sequence[Tensor | None]) -> list[AnyPrefix]:
    return [
        SitePrefix(k, v, rows, o) for k, v, o in zip(prefix.keys.unbind(), prefix.values.unbind(), offsets, strict=True)
    ]


def _pays(rows: Tensor, samples: int, length: int) -> bool:
    """Whether to absorb: to make keys and values is a product for every row of every condition, to do without them one
    of the same size for every query.

    Measured on one thread, K 512 and E 64, forward and backward: of 16 samples with 49 rows each, absorbed takes 0.45
    of the time at 8 queries a sample, 0.88 at 32 and 1.23 at 64; of 16 samples with 8 conditions of 16 rows, 0.82 at 4
    queries and 1.24 at 8.
    """
    return rows.shape[1] * rows.shape[2] > PER_QUERY * samples * length
