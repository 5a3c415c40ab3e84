"""Low-rank deltas of a mixed batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyperpelt_ds.kernels.adapter import check_index, segment
from hyperpelt_ds.kernels.errors import KernelDtypeError, KernelShapeError
from hyperpelt_ds.kernels.index import BatchIndex, copied
from hyperpelt_ds.kernels.regenerate import Later
from hyperpelt_ds.kernels.regenerate import bind as bind_later


class SiteLowRank(NamedTuple):
    """One branch's delta of one linear map, and which samples use which."""

    down: Tensor  # (C, I, r)
    up: Tensor  # (C, r, O)
    users: BatchIndex  # of C groups


def low_rank(x: Tensor, output: Tensor, deltas: Sequence[SiteLowRank]) -> Tensor:
    """output + sum over branches of x down up, every sample with the delta of its condition.

    x (B, T, I), output (B, T, O) -> (B, T, O). A branch adds nothing to a sample whose index there is -1. It is an
    adapter without activation, biases and scale; where the batch's grouping is not known on the host, weights are
    copied for every sample.

    Raises KernelShapeError and KernelDtypeError for arguments that do not fit.
    """
    _check(x, output, deltas)
    parts = _parts(deltas)
    sliced = all(part.users.spans is not None and not segment.copies_pay(part) for part in parts)
    if sliced and not torch.is_autocast_enabled(x.device.type):
        return segment.apply(x, output, parts, "identity")
    for delta in deltas:
        rows = delta.users.ids.clamp(min=0)
        narrow = torch.bmm(x, copied(delta.down, rows))
        narrow = narrow * (delta.users.ids >= 0).to(x.dtype).view(-1, 1, 1)
        output = torch.baddbmm(output, narrow, copied(delta.up, rows))
    return output


def bind(deltas: Sequence[SiteLowRank | Later]) -> Callable[[Tensor, Tensor], Tensor]:
    """`low_rank` as a function of x and output alone, with what depends on the weights alone done here (as in
    `adapter.bind`); deltas that are `Later` are made in every call, from down and up."""
    ready = [part for part in deltas if isinstance(part, SiteLowRank)]
    if len(ready) < len(deltas):
        return bind_later(deltas, _finish, low_rank)
    return _bind(ready)


def _finish(made: Sequence[Tensor], scale: Tensor, users: BatchIndex) -> SiteLowRank:
    down, up = made
    return SiteLowRank(down, scale * up, users)


def _bind(deltas: Sequence[SiteLowRank]) -> Callable[[Tensor, Tensor], Tensor]:
    def run(x: Tensor, output: Tensor) -> Tensor:
        return low_rank(x, output, deltas)

    if any(d.users.spans is None or d.down.requires_grad or d.up.requires_grad for d in deltas):
        return run
    prepared = segment.prepare(_parts(deltas), "identity")

    def run_prepared(x: Tensor, output: Tensor) -> Tensor:
        needed = torch.is_grad_enabled() and (x.requires_grad or output.requires_grad)
        return run(x, output) if needed or torch.is_autocast_enabled(x.device.type) else prepared(x, output)

    return run_prepared


def _check(x: Tensor, output: Tensor, deltas: Sequence[SiteLowRank]) -> None:
    if x.ndim != 3 or output.shape[:-1] != x.shape[:-1]:
        raise KernelShapeError(
            f"x and output: expected (samples, tokens, size) of the same samples and tokens, got {tuple(x.shape)} and "
            f"{tuple(output.shape)}"
        )
    mixed = torch.is_autocast_enabled(x.device.type)
    for number, delta in enumerate(deltas):
        groups, rank = len(delta.down), delta.down.shape[-1]
        for name, part, shape in (
            ("down", delta.down, (groups, x.shape[2], rank)),
            ("up", delta.up, (groups, rank, output.shape[2])),
        ):
            if part.shape != shape:
                raise KernelShapeError(f"deltas[{number}].{name}: expected shape {shape}, got {tuple(part.shape)}")
            if part.device != x.device or (part.dtype != x.dtype and not mixed):
                raise KernelDtypeError(
                    f"deltas[{number}].{name}: expected {x.dtype} on {x.device} as x is, got {part.dtype} on "
                    f"{part.device}"
                )
        check_index(f"deltas[{number}].users", delta.users, x, groups)


def _parts(deltas: Sequence[SiteLowRank]) -> list[segment.Part]:
    return [segment.Part(delta.down, None, delta.up, None, None, delta.users) for delta in deltas]
