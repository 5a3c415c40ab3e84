"""Generated weights that are never all there: made a chunk of sites at a time, dropped, and made again in backward.

For per-image conditions, whose weights grow with batch x sites. A `Store` holds one chunk; to ask for a site of another
one turns it over. So it asks for no order: a site may be used twice, never, or again by activation checkpointing, and
is right all the same; forward and backward that go through the sites in order make every chunk once each. An op on
such weights keeps its input and nothing else. This file knows neither what an op does nor where a site is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperpelt_ds.kernels.errors import KernelUnavailableError
from hyperpelt_ds.kernels.generate import generate, unpack
from hyperpelt_ds.kernels.index import BatchIndex

Shapes = Sequence[Sequence[int]]


class Store:
    """The weights of S sites, one chunk of `at_once` sites at a time, and what their gradients come to.

    In backward a site's weights are overwritten by their own gradient once they were used, so that a chunk takes no
    more than in forward. When a chunk is turned over, its gradients become those of the map in one product.
    """

    def __init__(self, rows: Tensor, weight: Tensor, bias: Tensor, shapes: Shapes, at_once: int, dtype: torch.dtype):
        self.conditions = rows.shape[1]
        self._rows, self._weight, self._bias = rows.detach(), weight.detach(), bias.detach()
        self._shapes, self._at_once, self._dtype = shapes, at_once, dtype
        self._chunk, self._packed = -1, torch.empty(0)
        self._graded: set[int] = set()
        """Places in the chunk that hold a gradient."""
        self._sums: tuple[Tensor, ...] | None = None

    def weights(self, site: int) -> list[Tensor]:
        """The tensors (C, *shape) of one site; good until a site of another chunk is asked for."""
        chunk, place = divmod(site, self._at_once)
        if chunk != self._chunk:
            self._turn_over()
            self._chunk, self._packed = chunk, self._make(self._sites(chunk))
        if place in self._graded:  # used once more: its weights have made room for their gradient
            return unpack(self._make(slice(site, site + 1))[0], self._shapes)
        return unpack(self._packed[place], self._shapes)

    def add(self, site: int, gradients: Sequence[Tensor | None]) -> None:
        """Takes in the gradients of what `weights(site)` just gave."""
        place = site % self._at_once
        assert site // self._at_once == self._chunk
        for own, gradient in zip(unpack(self._packed[place], self._shapes), gradients, strict=True):
            if place in self._graded:
                own.add_(0 if gradient is None else gradient)
            elif gradient is None:
                own.zero_()
            else:
                own.copy_(gradient)
        self._graded.add(place)

    def collect(self) -> tuple[Tensor, ...]:
        """The gradients of rows, weight and bias since it was asked last."""
        self._turn_over()
        sums, self._sums = self._sums, None
        whole = (self._rows, self._weight, self._bias)
        if sums is None:
            return tuple(torch.zeros_like(of) for of in whole)
        return tuple(own.to(of.dtype) for own, of in zip(sums, whole, strict=True))

    def _make(self, sites: slice) -> Tensor:
        """(sites, C, N)"""
        with torch.no_grad(), torch.autocast(self._rows.device.type, enabled=False):
            return generate(self._rows[sites], self._weight, self._bias).to(self._dtype)

    def _sites(self, chunk: int) -> slice:
        return slice(chunk * self._at_once, (chunk + 1) * self._at_once)

    def _turn_over(self) -> None:
        if self._graded:
            for place in set(range(len(self._packed))) - self._graded:
                self._packed[place].zero_()
            if self._sums is None:
                self._sums = tuple(
                    torch.zeros_like(of, dtype=torch.promote_types(of.dtype, torch.float32))  # summed over chunks
                    for of in (self._rows, self._weight, self._bias)
                )
            of_rows, of_weight, of_bias = self._sums
            sites = self._sites(self._chunk)
            rows = self._rows[sites]
            gradient = self._packed.to(rows.dtype).flatten(0, 1)
            of_rows[sites] += (gradient @ self._weight).view_as(rows)
            of_weight += gradient.mT @ rows.flatten(0, 1)
            of_bias += gradient.sum(0)
        self._chunk, self._packed, self._graded = -1, torch.empty(0), set()


class Later(NamedTuple):
    """One branch's weights at one site, to be made when an op runs on them."""

    store: Store
    site: int
    token: Tensor  # (), ties the op to the map in the graph
    scale: Tensor  # ()
    users: BatchIndex | None = None


def later(rows: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shapes: Shapes, at_once: int) -> list[Later]:
    """The sites of rows (S, C, E), weight (N, E), bias (N,) and scale (S,), each of tensors (C, *shape), N in all.

    They are computed as `generate` would here and now, autocast or not, and come in the type of `scale` or autocast's.
    """
    device = rows.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), bias.to(dtype)
    store = Store(rows, weight, bias, shapes, at_once, made_type(device, scale.dtype))
    token = _Map.apply(store, rows, weight, bias)
    return [Later(store, site, token, own) for site, own in enumerate(scale.unbind())]


def made_type(device: str, dtype: torch.dtype) -> torch.dtype:
    """The type that weights for activations of `dtype` are made in: autocast would cast them at every use."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype


Finish = Callable[[Sequence[Tensor], Tensor, BatchIndex], Any]
"""From made tensors, scale and users to what an op takes."""
Op = Callable[[Tensor, Tensor, list[Any]], Tensor]


def bind(parts: Sequence[Any], finish: Finish, op: Op) -> Callable[[Tensor, Tensor], Tensor]:
    """op(x, base, parts) as a function of x and base, where some parts are `Later`; the result is base + some f(x)."""
    tensors = [tensor for part in parts for tensor in _given(part)]
    return lambda x, base: _Run.apply(parts, finish, op, x, base, *tensors)


class _Map(torch.autograd.Function):
    """Stands for the generating map in the graph: its backward runs after that of every op on the store's weights."""

    @staticmethod
    def forward(ctx: Any, store: Store, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.store = store
        return rows.new_zeros(())

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.store.collect())


class _Run(torch.autograd.Function):
    """An op whose weights are made for it, forward and, with the op run again, backward."""

    @staticmethod
    def forward(ctx: Any, parts: Sequence[Any], finish: Finish, op: Op, x: Tensor, base: Tensor, *_: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.parts, ctx.finish, ctx.op, ctx.base = parts, finish, op, base.dtype
        device = x.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return op(x, base, [_ready(part, finish, *_leaves(part)) for part in parts])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph
            raise KernelUnavailableError(
                "weights made in chunks have no second derivative: leave model.generation_budget_mb unset"
            )
        x = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[3])
        leaves = [_leaves(part) for part in ctx.parts]
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            for made, given in leaves:
                for tensor in (*made, *given):
                    tensor.requires_grad_()
            ready = [_ready(part, ctx.finish, *own) for part, own in zip(ctx.parts, leaves, strict=True)]
            y = ctx.op(x, dy.to(ctx.base), ready)  # f(x) is all that matters: any base will do
        wanted = [tensor for made, given in leaves for tensor in (*made, *given)]
        wanted += [x] if x.requires_grad else []
        found = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True))
        of_given: list[Tensor | None] = []
        for part, (made, given) in zip(ctx.parts, leaves, strict=True):
            of_made = [next(found) for _ in made]
            if isinstance(part, Later):
                part.store.add(part.site, of_made)
                of_given.append(torch.zeros_like(part.token))
            of_given += [next(found) for _ in given]
        dbase = dy.to(ctx.base) if ctx.needs_input_grad[4] else None
        return None, None, None, next(found, None), dbase, *of_given


def _given(part: Any) -> list[Tensor]:
    """The part's tensors that are in the graph."""
    if isinstance(part, Later):
        return [part.token, part.scale]
    return [tensor for tensor in part if isinstance(tensor, Tensor)]


def _leaves(part: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The part's made tensors, and those that it was given, but for a token: out of the graph."""
    if isinstance(part, Later):
        return part.store.weights(part.site), [part.scale.detach()]
    return [], [tensor.detach() for tensor in _given(part)]


def _ready(part: Any, finish: Finish, made: list[Tensor], given: list[Tensor]) -> Any:
    if isinstance(part, Later):
        assert part.users is not None
        return finish(made, given[0], part.users)
    tensors = iter(given)
    return part._make(next(tensors) if isinstance(of, Tensor) else of for of in part)
