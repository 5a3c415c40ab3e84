"""Weights made a chunk of sites at a time: the same numbers and gradients as all at once, in much less memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hyperpelt_ds.kernels import generate, index_batch
from hyperpelt_ds.kernels.adapter import SiteAdapter
from hyperpelt_ds.kernels.adapter import bind as bind_adapter
from hyperpelt_ds.kernels.errors import KernelUnavailableError
from hyperpelt_ds.kernels.generate import sites_at_once, unpack
from hyperpelt_ds.kernels.low_rank import SiteLowRank
from hyperpelt_ds.kernels.low_rank import bind as bind_low_rank
from hyperpelt_ds.kernels.regenerate import later

sys.path.insert(0, str(ROOT / "launch"))

from live_bytes import LiveBytes

SITES, CONDITIONS, HYPER, SIZE, NARROW, TOKENS = 7, 4, 5, 6, 3, 2
ROWS = [0, 1, -1, 2, 3, 3]  # a sample without a condition, two with the same
KINDS = ("adapter", "adapter_norm", "low_rank")
CHUNKS = (1, 3, SITES)


class Leaves(NamedTuple):
    """What a stack of sites has gradients of: x, hyper-embeddings, the map, scales, and another branch's adapters."""

    x: Tensor
    rows: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor
    other: tuple[Tensor, ...]


def shapes_of(kind: str) -> tuple[tuple[int, ...], ...]:
    if kind == "low_rank":
        return ((SIZE, NARROW), (NARROW, SIZE))
    norm = ((SIZE,), (SIZE,)) if kind == "adapter_norm" else ()
    return ((SIZE, NARROW), (NARROW,), (NARROW, SIZE), (SIZE,), *norm)


def draw(kind: str, dtype: torch.dtype = torch.float64) -> Leaves:
    generator = torch.Generator().manual_seed(0)

    def of(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) / 2).to(dtype).requires_grad_()

    numbers = sum(map(math.prod, shapes_of(kind)))
    other = tuple(of(2, *shape) for shape in shapes_of("low_rank" if kind == "low_rank" else "adapter"))
    return Leaves(
        of(len(ROWS), TOKENS, SIZE), of(SITES, CONDITIONS, HYPER), of(numbers, HYPER), of(numbers), of(SITES), other
    )


def sites_of(kind: str, leaves: Leaves, at_once: int | None) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """What each site does, its weights made `at_once` or, with None, all of them by plain torch; beside them another
    branch whose weights are there."""
    users, all_use = index_batch(ROWS, groups=CONDITIONS), index_batch([0, 0, 1, 1, 0, 0])
    if at_once is not None:
        parts: Sequence[Any] = later(*leaves[1:5], shapes_of(kind), at_once)
        parts = [part._replace(users=users) for part in parts]
    else:
        packed = generate(leaves.rows, leaves.weight, leaves.bias)
        made = [unpack(site, shapes_of(kind)) for site in packed.unbind()]
        scales = leaves.scale.unbind()
        if kind == "low_rank":
            parts = [SiteLowRank(down, s * up, users) for (down, up), s in zip(made, scales, strict=True)]
        else:
            parts = [SiteAdapter(*m[:4], s, users, *m[4:]) for m, s in zip(made, scales, strict=True)]
    if kind == "low_rank":
        return [bind_low_rank([part, SiteLowRank(*leaves.other, all_use)]) for part in parts]
    beside = SiteAdapter(*leaves.other, torch.ones((), dtype=leaves.x.dtype), all_use)
    return [bind_adapter([part, beside], "gelu") for part in parts]


def through(sites: Sequence[Any], x: Tensor, order: Sequence[int], checkpointing: bool) -> Tensor:
    for site in order:
        x = checkpoint(sites[site], x, x, use_reentrant=False) if checkpointing else sites[site](x, x)
    return x


def outcome(
    kind: str, at_once: int | None, order: Sequence[int] = range(SITES), checkpointing: bool = False, passes: int = 1
) -> list[Tensor]:
    """The output, and the gradient of every leaf after so many passes without a reset."""
    leaves = draw(kind)
    for _ in range(passes):
        y = through(sites_of(kind, leaves, at_once), leaves.x, order, checkpointing)
        y.sin().sum().backward()
    flat = [*leaves[:5], *leaves.other]
    return [y.detach(), *(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in flat)]


def alike(one: Sequence[Tensor], two: Sequence[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(one, two, strict=True):
        assert (a - b).norm() <= tolerance * max(1.0, float(b.norm()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("at_once", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_give_the_output_and_every_gradient_of_all_at_once(kind, at_once, checkpointing):
    expected = outcome(kind, None)
    assert all(gradient.abs().sum() > 0 for gradient in expected)
    alike(outcome(kind, at_once, checkpointing=checkpointing), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("order", [[0, 2, 2, 6], [5, 1, 0, 5, 1], [3, 3], [6, 4, 2, 0]], ids=str)
@pytest.mark.parametrize("at_once", CHUNKS)
def test_sites_may_be_used_twice_never_and_in_any_order(order, at_once, checkpointing):
    alike(outcome("adapter", at_once, order, checkpointing), outcome("adapter", None, order))


@pytest.mark.parametrize("at_once", CHUNKS)
def test_gradients_of_several_passes_add_up(at_once):
    alike(outcome("adapter", at_once, passes=3), outcome("adapter", None, passes=3))


def test_a_graph_that_is_kept_gives_its_gradients_again():
    leaves = draw("adapter")
    loss = through(sites_of("adapter", leaves, 3), leaves.x, range(SITES), False).sin().sum()
    first = torch.autograd.grad(loss, leaves[:5], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves[:5]), strict=True))


@pytest.mark.parametrize("at_once", CHUNKS)
def test_in_float32_they_agree_to_a_millionth(at_once):
    results = []
    for chunk in (None, at_once):
        leaves = draw("adapter", torch.float32)
        through(sites_of("adapter", leaves, chunk), leaves.x, range(SITES), False).sin().sum().backward()
        results.append([leaf.grad for leaf in leaves[:5]])
    alike(results[1], results[0], 1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_they_are_as_exact_as_all_at_once(kind, checkpointing):
    exact = outcome(kind, None)
    errors = []
    for at_once in (None, 3):
        leaves = draw(kind, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = through(sites_of(kind, leaves, at_once), leaves.x, range(SITES), checkpointing)
        assert y.dtype == torch.bfloat16
        y.float().sin().sum().backward()
        found = [y.detach(), *(leaf.grad for leaf in (*leaves[:5], *leaves.other))]
        assert all(gradient.dtype == torch.float32 for gradient in found[1:])
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)])
    assert all(chunks <= 1.5 * whole + 0.01 for whole, chunks in zip(*errors, strict=True)), errors


def test_without_gradients_nothing_is_kept_of_a_chunk_but_the_last():
    leaves = draw("adapter")
    with torch.no_grad():
        expected = through(sites_of("adapter", leaves, None), leaves.x, range(SITES), False)
        assert torch.allclose(through(sites_of("adapter", leaves, 2), leaves.x, range(SITES), False), expected)


def test_second_derivatives_are_refused_by_the_setting_that_prevents_them():
    leaves = draw("adapter")
    y = through(sites_of("adapter", leaves, 2), leaves.x, range(SITES), False)
    with pytest.raises(KernelUnavailableError, match="generation_budget_mb"):
        torch.autograd.grad(y.sum(), leaves.x, create_graph=True)


@pytest.mark.parametrize("at_once", [1, 3, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_chunk_is_made_once_forward_and_once_backward_and_the_map_s_gradient_once_a_chunk(at_once, checkpointing):
    leaves = draw("adapter")
    chunks = math.ceil(SITES / at_once)
    with Products() as count:
        y = through(sites_of("adapter", leaves, at_once), leaves.x, range(SITES), checkpointing)
        assert count.of_numbers(leaves.weight) == chunks
        y.sum().backward()
    # the last chunk is still there when backward begins; then one product more a chunk is the map's gradient
    assert count.of_numbers(leaves.weight) == chunks + (chunks - 1) + chunks


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """The shapes that matrix products make."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0] in ("mm", "addmm", "bmm", "baddbmm"):
            self.shapes.append(result.shape)
        return result

    def of_numbers(self, weight: Tensor) -> int:
        """How many have the generated numbers, or their map, as a side."""
        return sum(len(weight) in shape for shape in self.shapes)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_no_more_generated_numbers_are_alive_than_the_formula_says(at_once, checkpointing):
    """2 n m L + 4 C G P bytes at two bytes a number: z of every site, weights and gradients of a chunk."""
    sites, batch, tokens, size, narrow, hyper = 12, 16, 2, 64, 16, 2
    shapes = ((size, narrow), (narrow,), (narrow, size), (size,))
    numbers = sum(map(math.prod, shapes))
    x = torch.randn(batch, tokens, size, requires_grad=True)
    maps = [torch.randn(sites, batch, hyper), torch.randn(numbers, hyper), torch.randn(numbers), torch.ones(sites)]
    maps = [part.requires_grad_() for part in maps]
    formula = batch * tokens * narrow * sites + 2 * at_once * batch * numbers
    with LiveBytes([x, *maps], at_least=2 * batch * size * narrow) as live:  # any of a site's two large tensors
        parts = later(*maps, shapes, at_once)
        stack = [bind_adapter([part._replace(users=index_batch(range(batch)))], "relu") for part in parts]
        through(stack, x, range(sites), checkpointing).sum().backward()
    assert live.peak >= 4 * at_once * batch * numbers, "it counts what it should"
    assert live.peak <= 1.1 * 4 * formula
    del parts, stack
    assert live.now == 0


def test_chunks_hold_a_share_but_never_less_than_makes_the_map_s_gradient_cheap():
    assert sites_at_once((24, 64, 64), None) == sites_at_once((24, 64, 64), 1.5) == 24
    assert sites_at_once((24, 64, 64), 0.5) == 12
    assert sites_at_once((24, 64, 64), 0.01) == 4  # 4 x 64 rows
    assert sites_at_once((24, 256, 64), 0.01) == 1
    assert sites_at_once((24, 4, 64), 0.01) == 24  # a batch of four tasks is never worth it


def test_packed_rows_are_read_where_they_lie():
    packed = torch.randn(2, 3, sum(map(math.prod, shapes_of("adapter_norm"))))
    parts = unpack(packed, shapes_of("adapter_norm"))
    assert [part.shape[2:] for part in parts] == [torch.Size(shape) for shape in shapes_of("adapter_norm")]
    assert all(part.untyped_storage().data_ptr() == packed.data_ptr() for part in parts)
    assert torch.equal(torch.cat([part.flatten(2) for part in parts], -1), packed)
