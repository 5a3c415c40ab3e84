"""Adapters in plain torch for a batch whose grouping is known on the host: slices of weights and samples, no copies.

Every span of the index (conditions that follow each other, equally many samples each) is one batched product on views.
One condition for the whole batch, a batch sorted by condition, and a condition of its own for every sample are all of
that kind. The backward pass is written out: it makes what autograd would, in fewer passes over the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperpelt_ds.kernels.adapter.reference import ACTIVATIONS
from hyperpelt_ds.kernels.errors import KernelUnavailableError
from hyperpelt_ds.kernels.index import BatchIndex, Span

_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda gradient, z: torch.ops.aten.threshold_backward(gradient, z, 0),
    "gelu": lambda gradient, z: torch.ops.aten.gelu_backward(gradient, z),
    "gelu_new": lambda gradient, z: torch.ops.aten.gelu_backward(gradient, z, approximate="tanh"),
    "silu": lambda gradient, z: torch.ops.aten.silu_backward(gradient, z),
    "identity": lambda gradient, z: gradient,
}


SPAN_BYTES = 512 * 1024
"""Bytes of weights that are copied (and their gradients added) in the time that one more span takes, on a CPU: 60 us
forward and backward, mostly the host's. Eight tasks unevenly in 16 samples of 8 tokens (D 512, R 24): 1.1 ms with six
spans, 0.9 ms with copies; from R 64 on or with more samples, spans are as fast."""


class Part(NamedTuple):
    """One branch: scale * (act(x down + down_bias) up + up_bias), every sample with its condition's weights."""

    down: Tensor  # (C, I, R)
    down_bias: Tensor | None  # (C, R)
    up: Tensor  # (C, R, O)
    up_bias: Tensor | None  # (C, O)
    scale: Tensor | None  # ()
    users: BatchIndex


def apply(x: Tensor, residual: Tensor, parts: Sequence[Part], activation: str) -> Tensor:
    """residual (B, T, O) + what the parts make of x (B, T, I)."""
    tensors = [tensor for part in parts for tensor in part[:5]]
    needed = any(tensor is not None and tensor.requires_grad for tensor in (x, residual, *tensors))
    if needed and torch.is_grad_enabled():
        made: Tensor = _Segments.apply(x, residual, activation, [part.users for part in parts], *tensors)
        return made
    return prepare(parts, activation)(x, residual)


def prepare(parts: Sequence[Part], activation: str) -> Callable[[Tensor, Tensor], Tensor]:
    """What `apply` does without gradients, as a function of x and residual, with all that weights decide done here.

    In decoding the same weights are applied for every token: slicing them anew cost as much as the products.
    """
    parts = [_copied(part) if copies_pay(part) else part for part in parts]
    if any(part.users.lengths is not None for part in parts):
        return lambda x, residual: _forward(x.contiguous(), residual, parts, activation)[0]
    act = ACTIVATIONS[activation]
    biases = _biases(parts)
    ready = [(part.users, 1.0 if part.scale is None else float(part.scale), _slices(part)) for part in parts]

    def run(x: Tensor, residual: Tensor) -> Tensor:
        x = x.contiguous()
        start, rest = _start(residual)
        y = start + biases
        for users, scale, slices in ready:
            own_x, own_y = _in_order(x, users), _in_order(y, users)
            for span, bias, down, up in slices:
                tokens = _samples(own_x, span)
                hidden = act(torch.bmm(tokens, down) if bias is None else torch.baddbmm(bias, tokens, down))
                _samples(own_y, span).baddbmm_(hidden, up, alpha=scale)
            y = _in_batch_order(own_y, users)
        return y if rest is None else y + rest

    return run


def copies_pay(part: Part) -> bool:
    """Whether copying weights for every sample costs less than a product for every span."""
    users = part.users
    if users.spans is None or len(users.spans) < 2 or not users.complete:
        return False
    numbers = part.down.shape[1] * part.down.shape[2] + part.up.shape[1] * part.up.shape[2]
    return len(users.ids) * numbers * part.down.element_size() < SPAN_BYTES * (len(users.spans) - 1)


def _copied(part: Part) -> Part:
    """The part with every sample as a condition of its own."""
    users, batch = part.users, len(part.users.ids)
    own = torch.arange(batch, dtype=torch.int32, device=users.ids.device)
    alone = BatchIndex(own, own, users.ptr, batch, users.lengths, (1,) * batch, (Span(0, batch, 0, 1),), False, True)
    tensors = (None if tensor is None else tensor.index_select(0, users.ids) for tensor in part[:4])
    return Part._make((*tensors, part.scale, alone))


def _slices(part: Part) -> list[tuple[Span, Tensor | None, Tensor, Tensor]]:
    """Each span's down_bias (groups, 1, R), down and up."""
    bias = None if part.down_bias is None else part.down_bias.unsqueeze(1)
    return [
        (span, None if bias is None else _weights(bias, span), _weights(part.down, span), _weights(part.up, span))
        for span in part.users.spans or ()
    ]


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        activation: str,
        indices: list[BatchIndex],
        *tensors: Tensor | None,
    ) -> Tensor:
        x = x.contiguous()
        y, narrow = _forward(x, residual, _parts(tensors, indices), activation)
        ctx.save_for_backward(x, *narrow, *tensors)
        ctx.activation, ctx.indices = activation, indices
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph
            raise KernelUnavailableError('the torch path has no second derivative: use backend="reference"')
        x, *rest = ctx.saved_tensors
        count = len(ctx.indices)
        parts = _parts(rest[count:], ctx.indices)
        needs = ctx.needs_input_grad
        dx, gradients = _backward(dy.contiguous(), x, rest[:count], parts, ctx.activation, needs[0], any(needs[4:]))
        return dx, dy if needs[1] else None, None, None, *gradients


def _parts(tensors: Sequence[Tensor | None], indices: Sequence[BatchIndex]) -> list[Part]:
    return [Part._make((*tensors[5 * n : 5 * n + 5], index)) for n, index in enumerate(indices)]


def _forward(x: Tensor, residual: Tensor, parts: Sequence[Part], activation: str) -> tuple[Tensor, list[Tensor]]:
    """The output, and each part's z = x down + down_bias (B, T, R) in the order of its spans."""
    narrow: list[Tensor] = []
    start, rest = _start(residual)
    y = start + _biases(parts, x.shape[1])  # new, so that products may add to it in place
    for part in parts:
        index = part.users
        own_x, own_y = _in_order(x, index), _in_order(y, index)
        z = _new(x, (*x.shape[:2], part.down.shape[2]), zero=not index.complete)
        for span, bias, down, _ in _slices(part):
            tokens, into = _samples(own_x, span), _samples(z, span)
            if bias is None:
                torch.bmm(tokens, down, out=into)
            else:
                torch.baddbmm(bias, tokens, down, out=into)
        hidden = _scaled(ACTIVATIONS[activation](z), part)
        for span in index.spans or ():
            _samples(own_y, span).baddbmm_(_samples(hidden, span), _weights(part.up, span))
        y = _in_batch_order(own_y, index)
        narrow.append(z)
    return y if rest is None else y + rest, narrow


def _start(residual: Tensor) -> tuple[Tensor, Tensor | None]:
    """What biases and products are added to, and what comes last.

    In half precision that is the residual: every sum is rounded, which costs most beside the largest (were it first, y
    would have 1.4 times the reference's error).
    """
    if residual.dtype in (torch.bfloat16, torch.float16):
        return torch.zeros_like(residual, memory_format=torch.contiguous_format), residual
    return residual.contiguous(), None


def _backward(
    dy: Tensor, x: Tensor, narrow: Sequence[Tensor], parts: Sequence[Part], activation: str, inputs: bool, weights: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x and of the five tensors of every part; those not needed are None."""
    dx: Tensor | None = None
    gradients: list[Tensor | None] = []
    for part, z in zip(parts, narrow, strict=True):
        index = part.users
        own_x, own_dy = _in_order(x, index), _in_order(dy, index)
        if index.lengths is not None:
            own_dy = own_dy * _in_order(_live(index, dy.shape[1], dy.dtype), index)
        dh = _new(z, z.shape, zero=not index.complete)
        for span in index.spans or ():
            torch.bmm(_samples(own_dy, span), _weights(part.up, span).mT, out=_samples(dh, span))
        dz = _SLOPES[activation](dh if part.scale is None else dh * part.scale, z)
        if inputs:
            own_dx = _new(x, x.shape, zero=not index.complete) if dx is None else _in_order(dx, index)
            for span in index.spans or ():
                beta = 0 if dx is None else 1  # 0 never reads what is there
                _samples(own_dx, span).baddbmm_(_samples(dz, span), _weights(part.down, span).mT, beta=beta)
            dx = _in_batch_order(own_dx, index)
        gradients += _weight_gradients(part, own_x, own_dy, z, dh, dz, activation) if weights else [None] * 5
    return dx, gradients


def _weight_gradients(
    part: Part, x: Tensor, dy: Tensor, z: Tensor, dh: Tensor, dz: Tensor, activation: str
) -> list[Tensor | None]:
    """Gradients of down, down_bias, up, up_bias and scale; all token tensors are in the order of the index's spans."""
    index = part.users
    idle = index.counts is None or min(index.counts, default=0) == 0  # some condition that no sample uses
    h = ACTIVATIONS[activation](z)
    scaled = _scaled(h, part)
    down, up = (_new(of, of.shape, zero=idle) for of in (part.down, part.up))
    down_bias, up_bias = (
        None if of is None else _new(of, of.shape, zero=idle) for of in (part.down_bias, part.up_bias)
    )
    for span in index.spans or ():
        torch.bmm(_samples(x, span).mT, _samples(dz, span), out=_weights(down, span))
        torch.bmm(_samples(scaled, span).mT, _samples(dy, span), out=_weights(up, span))
        for bias, of in ((down_bias, dz), (up_bias, dy)):
            if bias is not None:
                torch.sum(_samples(of, span), 1, out=_weights(bias, span))
    if part.scale is None:
        return [down, down_bias, up, up_bias, None]
    scale = (dh * h).sum()
    if up_bias is not None and part.up_bias is not None:
        scale = scale + (up_bias * part.up_bias).sum()
        up_bias = up_bias * part.scale
    return [down, down_bias, up, up_bias, scale]


def _biases(parts: Sequence[Part], length: int = 0) -> Tensor | float:
    """The sum of scale * up_bias that every sample gets, (B or 1, 1, O), or (B, T, O) where there are lengths."""
    total: Tensor | float = 0.0
    for part in parts:
        if part.up_bias is None:
            continue
        index = part.users
        own = part.up_bias if part.scale is None else part.up_bias * part.scale
        if not (index.complete and index.groups == 1):
            own = own.index_select(0, index.ids if index.complete else index.ids.clamp(min=0))
        own = own.unsqueeze(1)
        if not index.complete:
            own = own * (index.ids >= 0).view(-1, 1, 1)
        if index.lengths is not None:
            own = own * _live(index, length, own.dtype)
        total = total + own
    return total


def _scaled(hidden: Tensor, part: Part) -> Tensor:
    """hidden (B, T, R) in the order of the part's spans, times the scale, 0 at padding."""
    if part.scale is not None:
        hidden = hidden * part.scale
    if part.users.lengths is not None:
        hidden = hidden * _in_order(_live(part.users, hidden.shape[1], hidden.dtype), part.users)
    return hidden


def _live(index: BatchIndex, length: int, dtype: torch.dtype) -> Tensor:
    """(B, T, 1), 1 for real tokens and 0 for padding."""
    assert index.lengths is not None
    places = torch.arange(length, device=index.lengths.device)
    return (places < index.lengths.unsqueeze(1)).to(dtype).unsqueeze(2)


def _new(like: Tensor, shape: Sequence[int], zero: bool) -> Tensor:
    """A contiguous tensor; what no span writes must be 0."""
    return like.new_zeros(shape) if zero else like.new_empty(shape)


def _in_order(tensor: Tensor, index: BatchIndex) -> Tensor:
    return tensor.index_select(0, index.order) if index.permuted else tensor


def _in_batch_order(tensor: Tensor, index: BatchIndex) -> Tensor:
    return torch.empty_like(tensor).index_copy_(0, index.order.long(), tensor) if index.permuted else tensor


def _samples(tensor: Tensor, span: Span) -> Tensor:
    """The tokens (groups, samples x T, N) of the span's samples, a view."""
    if span.stop - span.start < tensor.shape[0]:
        tensor = tensor[span.start : span.stop]
    return tensor.view(span.groups, -1, tensor.shape[2])


def _weights(tensor: Tensor, span: Span) -> Tensor:
    """The weights of the span's conditions, a view."""
    return tensor[span.first : span.first + span.groups] if span.groups < tensor.shape[0] else tensor
