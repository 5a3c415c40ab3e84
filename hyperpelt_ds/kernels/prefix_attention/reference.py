"""Attention with a prefix as the formula has it, to be believed rather than fast: every other form must equal it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperpelt_ds.kernels.prefix_attention.records import AnyPrefix, SiteRows


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[AnyPrefix],
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """softmax(scale * q [P_k; K]^T + [offset; bias]) [P_v; V], sample by sample, head by head; twice differentiable."""
    group = query.shape[1] // key.shape[1]
    made = [p.materialised() if isinstance(p, SiteRows) else p for p in prefixes]
    outputs = []
    for sample in range(query.shape[0]):
        used = [prefix for prefix in made if prefix.rows[sample] >= 0]
        for head in range(query.shape[1]):
            q, k, v = query[sample, head], key[sample, head // group], value[sample, head // group]
            columns = slice(head // group * k.shape[1], (head // group + 1) * k.shape[1])
            scores = scale * q @ k.T
            if bias is not None:
                scores = scores + bias.expand(query.shape[0], query.shape[1], -1, -1)[sample, head]
            if mask is not None:
                scores = scores.masked_fill(~mask.expand(query.shape[0], -1, -1, -1)[sample, 0], -torch.inf)
            before = [
                scale * q @ p.keys[p.rows[sample], :, columns].T + (0 if p.offset is None else p.offset) for p in used
            ]
            values = [p.values[p.rows[sample], :, columns] for p in used]
            outputs.append(torch.cat([*before, scores], 1).softmax(1) @ torch.cat([*values, v]))
    return torch.stack(outputs).view(query.shape)
