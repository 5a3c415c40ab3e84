"""Random adapters of a mixed batch and what the formula makes of them: shared by the tests of every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from hyperpelt_ds.kernels import adapter, index_batch
from hyperpelt_ds.kernels.adapter import SiteAdapter

ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu", "identity")


def draw_adapter(
    generator: torch.Generator,
    ids: Sequence[int],
    groups: int,
    size: int,
    narrow: int,
    dtype: torch.dtype = torch.float64,
    lengths: Tensor | None = None,
    packed: bool = False,
) -> SiteAdapter:
    """Adapters of one branch that need gradients; with `packed`, views of one row a condition, as heads make them."""
    sizes = [size * narrow, narrow, narrow * size, size]
    row = torch.randn(groups, sum(sizes), generator=generator, dtype=torch.float64) / max(size, narrow) ** 0.5
    if packed:
        down, down_bias, up, up_bias = row.to(dtype).requires_grad_().split(sizes, 1)
    else:
        down, down_bias, up, up_bias = (part.to(dtype).contiguous().requires_grad_() for part in row.split(sizes, 1))
    scale = torch.tensor(0.7, dtype=dtype).requires_grad_()
    shapes = down.view(groups, size, narrow), down_bias, up.view(groups, narrow, size), up_bias
    return SiteAdapter(*shapes, scale, index_batch(ids, lengths, groups=groups))


def leaves(x: Tensor, residual: Tensor, parts: Sequence[SiteAdapter]) -> list[Tensor]:
    return [x, residual, *(tensor for part in parts for tensor in part[:5])]


def by_formula(
    x: Tensor, residual: Tensor, parts: Sequence[SiteAdapter], activation: str, dy: Tensor, dtype: Any = torch.float64
) -> tuple[Tensor, list[Tensor]]:
    """y and all gradients by the reference, in float64 if nothing else is said."""
    plain = [tensor.detach().to(dtype).requires_grad_() for tensor in leaves(x, residual, parts)]
    again = [SiteAdapter(*plain[2 + 5 * n : 7 + 5 * n], part.users) for n, part in enumerate(parts)]
    y = adapter(plain[0], plain[1], again, activation, backend="reference")
    return y, list(torch.autograd.grad(y, plain, dy.to(dtype)))


def error(actual: Tensor, expected: Tensor) -> float:
    """The relative error in the 2-norm; absolute where nothing is expected."""
    size = expected.double().norm().item()
    return (actual.double() - expected.double()).norm().item() / (size or 1.0)


@st.composite
def batches(draw, sizes: Sequence[int], narrows: Sequence[int], most_tokens: int = 40):
    """(tokens, size, lengths or None, [(ids, groups, narrow) of one or two branches], activation, seed): one token,
    conditions that nobody uses, samples without one, empty samples, sorted or not."""
    samples = draw(st.integers(1, 6))
    branches = []
    for _ in range(draw(st.integers(1, 2))):
        groups = draw(st.integers(1, 4))
        ids = draw(st.lists(st.integers(-1, groups - 1), min_size=samples, max_size=samples))
        branches.append((sorted(ids) if draw(st.booleans()) else ids, groups, draw(st.sampled_from(narrows))))
    tokens = draw(st.one_of(st.just(1), st.integers(1, most_tokens)))
    lengths = draw(st.one_of(st.none(), st.lists(st.integers(0, tokens), min_size=samples, max_size=samples)))
    activation = draw(st.sampled_from(ACTIVATIONS))
    return tokens, draw(st.sampled_from(sizes)), lengths, branches, activation, draw(st.integers(0, 2**31))


def make(case, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[SiteAdapter], str, Tensor]:
    """The tensors of a drawn case: x, residual, branches, activation and the gradient of y."""
    tokens, size, lengths, branches, activation, seed = case
    generator = torch.Generator().manual_seed(seed)
    samples = len(branches[0][0])
    real = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    x, residual, dy = (torch.randn(samples, tokens, size, generator=generator).to(dtype) for _ in range(3))
    parts = [draw_adapter(generator, *branch[:2], size, branch[2], dtype, real, seed % 2 == 0) for branch in branches]
    return x.requires_grad_(), residual.requires_grad_(), parts, activation, dy
