"""Which samples of a batch use which condition: worked out once a batch, read by every kernel at every site.

`index_batch` works on the host, where a batch is made, so that sizes are known as plain integers and nothing waits for
a device. `index_on_device` is for ids that are already on one: it has no integers to offer, and the choices that need
them fall back to a gather.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperpelt_ds.kernels.errors import KernelShapeError


class Span(NamedTuple):
    """`groups` conditions from `first` on, each used by `samples` samples, all side by side from sample `start` on.

    Their samples and their weights are then slices, and one batched product serves them without a copy of either.
    """

    first: int
    groups: int
    start: int
    samples: int

    @property
    def stop(self) -> int:
        return self.start + self.groups * self.samples


class BatchIndex(NamedTuple):
    """The condition of every sample, -1 for none, and the samples of every condition.

    ids (B,), order (B,) and ptr (groups + 1,) are int32: the samples of condition g are order[ptr[g] : ptr[g + 1]], in
    the order of the batch; those without a condition come first. lengths (B,) int32, or None: tokens from there on get
    nothing. Known on the host or None: counts, samples of each condition; spans, every sample that has a condition and
    every condition once, in the order of the batch, or with `permuted` in that of `order`; `complete`, whether every
    sample has one.
    """

    ids: Tensor
    order: Tensor
    ptr: Tensor
    groups: int
    lengths: Tensor | None = None
    counts: tuple[int, ...] | None = None
    spans: tuple[Span, ...] | None = None
    permuted: bool = False
    complete: bool = False


def index_batch(
    ids: Sequence[int] | Tensor,
    lengths: Sequence[int] | Tensor | None = None,
    *,
    groups: int | None = None,
    device: torch.device | str | None = None,
) -> BatchIndex:
    """The index of a batch whose samples use conditions `ids` (B,), -1 for none, of `groups` that there are.

    `ids` are integers or a tensor on the CPU; `groups` is the largest id + 1 unless given. `lengths` (B,) are the real
    tokens of each sample. Raises KernelShapeError for an id out of range and for lengths that do not fit.
    """
    if isinstance(ids, Tensor):
        if ids.device.type != "cpu":
            raise KernelShapeError(f"ids: expected integers on the host, got a tensor on {ids.device}")
        ids = ids.tolist()
    groups = max(ids, default=-1) + 1 if groups is None else groups
    for place, number in enumerate(ids):
        if not -1 <= number < groups:
            raise KernelShapeError(f"ids[{place}] is {number}: expected -1 (none) to {groups - 1}, {groups} groups")
    order = sorted(range(len(ids)), key=ids.__getitem__)  # stable
    counts = [0] * groups
    for number in ids:
        if number >= 0:
            counts[number] += 1
    ptr = [*itertools.accumulate(counts, initial=len(ids) - sum(counts))]
    spans, by_order = _spans(ids), _spans([ids[sample] for sample in order])
    scattered = len(set(ids) - {-1}) < sum(number >= 0 for number, _ in itertools.groupby(ids))
    permuted = scattered or len(spans) > 2 * len(by_order)  # else moving the samples costs more than it spares
    made = [torch.tensor(part, dtype=torch.int32, device=device) for part in (ids, order, ptr)]
    chosen = by_order if permuted else spans
    known = (_lengths(lengths, len(ids), device), tuple(counts), chosen, permuted, sum(counts) == len(ids))
    return BatchIndex._make((*made, groups, *known))


def index_on_device(rows: Tensor, groups: int, lengths: Tensor | None = None) -> BatchIndex:
    """The index of conditions `rows` (B,) that live on a device; made there, so that nothing waits.

    For the same reason nothing is checked: what is out of range reads memory out of range.
    """
    ordered, order = rows.sort(stable=True)
    ptr = torch.searchsorted(ordered, torch.arange(groups + 1, device=rows.device, dtype=rows.dtype))
    return BatchIndex(rows.int(), order.int(), ptr.int(), groups, None if lengths is None else lengths.int())


def _lengths(lengths: Sequence[int] | Tensor | None, batch: int, device: torch.device | str | None) -> Tensor | None:
    if lengths is None:
        return None
    made = torch.as_tensor(lengths, dtype=torch.int32, device=device)
    if made.shape != (batch,):
        raise KernelShapeError(f"lengths: expected one for each of {batch} samples, got shape {tuple(made.shape)}")
    known = lengths if not isinstance(lengths, Tensor) else lengths.tolist() if lengths.device.type == "cpu" else []
    if min(known, default=0) < 0:
        raise KernelShapeError(f"lengths: expected 0 or more, got {min(known)}")
    return made


def _spans(ids: Sequence[int]) -> tuple[Span, ...]:
    """Runs of equal ids, those joined that make one batched product: equally long, of ids that follow each other."""
    spans: list[Span] = []
    start = 0
    for number, run in itertools.groupby(ids):
        samples = len(list(run))
        last = spans[-1] if spans else None
        if number >= 0:
            if last and last.stop == start and last.samples == samples and last.first + last.groups == number:
                spans[-1] = last._replace(groups=last.groups + 1)
            else:
                spans.append(Span(number, 1, start, samples))
        start += samples
    return tuple(spans)


def copied(weights: Tensor, condition: Tensor) -> Tensor:
    """Each sample's weights (B, ...) of those of all conditions (C, ...), for condition (B,) of 0 to C - 1."""
    made: Tensor = _Copied.apply(weights, condition) if torch.is_grad_enabled() else weights.index_select(0, condition)
    return made


class _Copied(torch.autograd.Function):
    """Its gradients are added up by a matrix product: in a fixed order and 32 bits, where CUDA's own would be in any
    order and the type's."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, condition: Tensor) -> Tensor:
        ctx.save_for_backward(condition)
        ctx.conditions = len(weights)
        return weights.index_select(0, condition)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (condition,) = ctx.saved_tensors
        users = torch.arange(ctx.conditions, device=condition.device).unsqueeze(1) == condition
        return (users.to(gradient.dtype) @ gradient.flatten(1)).view(-1, *gradient.shape[1:]), None
