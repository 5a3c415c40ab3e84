"""Random calls of prefix attention, shared by the tests of every way and every kernel that computes it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from hyperpelt_ds.kernels.prefix_attention import AnyPrefix, SitePrefix, SiteRows


class Call(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    prefixes: list[AnyPrefix]
    mask: Tensor | None
    bias: Tensor | None
    scale: float

    def inputs(self) -> list[Tensor]:
        """Every tensor that has a gradient."""
        parts = [*self[:3], *(part for prefix in self.prefixes for part in prefix)]
        return [part for part in parts if isinstance(part, Tensor) and part.requires_grad]


@st.composite
def calls(draw: Any, groups: tuple[int, ...] = (1, 2)) -> Call:
    """Odd sizes, one to three branches of both forms, with conditions in the samples' order, out of it, or missing."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    batch, length, keys, size = (draw(st.integers(1, n)) for n in (6, 5, 7, 4))
    heads, group = draw(st.integers(1, 3)), draw(st.sampled_from(groups))
    prefixes: list[AnyPrefix] = []
    for _ in range(draw(st.integers(1, 3))):
        conditions = draw(st.sampled_from([n for n in range(1, 7) if n <= batch]))
        lowest = draw(st.sampled_from([-1, 0]))
        rows = torch.randint(lowest, conditions, (batch,), generator=generator)
        if draw(st.booleans()):
            rows = torch.arange(batch) * conditions // batch  # sorted; in equal parts where they divide
        columns, hyper, width = draw(st.integers(1, 4)), draw(st.integers(1, 5)), heads * size
        offset = randn() if draw(st.booleans()) else None
        if draw(st.booleans()):
            made = randn(conditions, columns, width), randn(conditions, columns, width)
            prefixes.append(SitePrefix(*made, rows, offset))
        else:
            maps = randn(conditions, columns, hyper), randn(2 * width, hyper), randn(2 * width)
            prefixes.append(SiteRows(*maps, rows, offset))
    mask = bias = None
    if draw(st.booleans()):
        mask = torch.rand(draw(st.sampled_from([1, batch])), 1, length, keys, generator=generator) < 0.6
        mask[..., 0] = True  # every query sees something
    if draw(st.booleans()):
        heads_of_bias = draw(st.sampled_from([1, heads * group]))
        bias = torch.randn(1, heads_of_bias, length, keys, generator=generator, dtype=torch.float64)
    query = randn(batch, heads * group, length, size)
    return Call(query, randn(batch, heads, keys, size), randn(batch, heads, keys, size), prefixes, mask, bias, 0.6)
