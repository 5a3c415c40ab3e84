"""What attention is given of one branch's prefix at one site, in either of its two forms."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from hyperpelt_ds.kernels.errors import KernelShapeError
from hyperpelt_ds.kernels.index import copied


class Spread(NamedTuple):
    """How the prefixes of C conditions come to B samples, told once for all sites.

    condition (B,) int64 is that of each sample; None if every condition serves B / C samples, in order, so that nothing
    has to be copied. missing (B,) bool are samples without a prefix; None if there are none.
    """

    condition: Tensor | None
    missing: Tensor | None


class SitePrefix(NamedTuple):
    """Key and value rows, with the condition of each sample in `rows` (B,), -1 for none."""

    keys: Tensor  # (C, P, K)
    values: Tensor  # (C, P, K)
    rows: Tensor  # (B,) int64
    offset: Tensor | None = None  # (), added to the scores of these columns; None for 0
    spread: Spread | None = None  # of `rows`; found anew at every call if it is not given


class SiteRows(NamedTuple):
    """The same before it is made: keys and values are the halves of `hyper` weight^T + bias, the rows of every head one
    after the other."""

    hyper: Tensor  # (C, P, E)
    weight: Tensor  # (2K, E)
    bias: Tensor  # (2K,)
    rows: Tensor  # (B,) int64
    offset: Tensor | None = None
    spread: Spread | None = None

    def materialised(self) -> SitePrefix:
        """Keys and values, made in one product."""
        keys, values = F.linear(self.hyper, self.weight, self.bias).chunk(2, -1)
        return SitePrefix(keys, values, self.rows, self.offset, self.spread)


AnyPrefix = SitePrefix | SiteRows


def spread_of(rows: Tensor, conditions: int) -> Spread:
    """The Spread of `rows` (B,). On a device it is always the general one: to look would be to wait for the device.

    Raises KernelShapeError for a row that is no condition, where this costs no waiting.
    """
    if rows.device.type != "cpu":
        return Spread(rows.clamp(min=0), rows < 0)
    numbers = rows.tolist()
    low, high = min(numbers), max(numbers)
    if not -1 <= low <= high < conditions:
        raise KernelShapeError(f"rows: allowed are -1 to {conditions - 1}, got {low} to {high}")
    each, rest = divmod(len(rows), conditions)
    if not rest and numbers == [condition for condition in range(conditions) for _ in range(each)]:
        return Spread(None, None)
    return Spread(rows.clamp(min=0), rows < 0 if low < 0 else None)


def spread(prefix: AnyPrefix) -> AnyPrefix:
    """The prefix with conditions copied to samples where they are not in the samples' order, so that they are now.

    Done before, for generation, which comes back at every token; `spread.condition` is then None.
    """
    if prefix.spread is not None and prefix.spread.condition is None:
        return prefix
    known = prefix.spread if prefix.spread is not None else spread_of(prefix.rows, prefix[0].shape[0])
    if known.condition is None:
        return prefix._replace(spread=known)
    after = known._replace(condition=None)
    if isinstance(prefix, SiteRows):
        return prefix._replace(hyper=copied(prefix.hyper, known.condition), spread=after)
    keys, values = (copied(part, known.condition) for part in prefix[:2])
    return prefix._replace(keys=keys, values=values, spread=after)
