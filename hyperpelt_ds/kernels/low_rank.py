"""Low-rank deltas of a mixed batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class SiteLowRank(NamedTuple):
    """One branch's delta of one linear map, with the condition of each sample in `rows` (B,), -1 for none."""

    down: Tensor  # (C, I, r)
    up: Tensor  # (C, r, O)
    rows: Tensor  # (B,) int64


def low_rank(x: Tensor, output: Tensor, deltas: Sequence[SiteLowRank]) -> Tensor:
    """output + sum over branches of x down up, every sample with the delta of its condition.

    x (B, T, I), output (B, T, O) -> (B, T, O). A sample whose row is -1 in a branch gets nothing from that branch.
    """
    for delta in deltas:
        rows = delta.rows.clamp(min=0)
        narrow = torch.bmm(x, delta.down.index_select(0, rows)) * (delta.rows >= 0).to(x.dtype).view(-1, 1, 1)
        output = torch.baddbmm(output, narrow, delta.up.index_select(0, rows))
    return output
