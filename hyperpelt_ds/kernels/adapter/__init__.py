"""Bottleneck adapters of a mixed batch: the contract, what is checked, and which backend runs a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyperpelt_ds.kernels import dispatch
from hyperpelt_ds.kernels.adapter import reference, segment
from hyperpelt_ds.kernels.adapter.reference import ACTIVATIONS
from hyperpelt_ds.kernels.errors import KernelDtypeError, KernelShapeError, KernelUnavailableError
from hyperpelt_ds.kernels.index import BatchIndex
from hyperpelt_ds.kernels.regenerate import Later
from hyperpelt_ds.kernels.regenerate import bind as bind_later

__all__ = ["ACTIVATIONS", "SiteAdapter", "adapter", "bind"]

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRITON_BOTTLENECK = 256


class SiteAdapter(NamedTuple):
    """One branch's adapters at one site, and which samples use which."""

    down: Tensor  # (C, D, R)
    down_bias: Tensor  # (C, R)
    up: Tensor  # (C, R, D)
    up_bias: Tensor  # (C, D)
    scale: Tensor  # ()
    users: BatchIndex  # of C groups
    gain: Tensor | None = None  # (C, D)
    shift: Tensor | None = None  # (C, D)


def adapter(
    x: Tensor, residual: Tensor, adapters: Sequence[SiteAdapter], activation: str, *, backend: str = "auto"
) -> Tensor:
    """residual + sum over branches of scale * norm(act(x down + down_bias) up + up_bias).

    `norm` is a layer norm with the branch's gain and shift where it has them (HyperFormer), else nothing.
    x, residual (B, T, D) -> (B, T, D). A branch adds nothing to a sample whose index there is -1, nor to tokens from
    the branch's lengths on. Paper section 4 (adapter beside the feed-forward block); the activation is one of
    ACTIVATIONS, the backend one of dispatch.BACKENDS. Under autocast everything is computed in its type.

    Raises KernelShapeError and KernelDtypeError for arguments that do not fit, KernelUnavailableError for a backend
    that cannot run the call.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.get_autocast_dtype(x.device.type)
            return adapter(*_cast(dtype, x, residual, adapters), activation, backend=backend)
    _check(x, residual, adapters)
    chosen = dispatch.choose(backend, x, lambda: _torch_cannot(adapters), lambda: _triton_cannot(x, adapters))
    if chosen == "triton":
        from hyperpelt_ds.kernels.adapter import fused  # it imports triton, which only CUDA builds of torch bring

        branches = [fused.Branch(*part[:5], *part.users[:3]) for part in adapters]
        return fused.apply(x, residual, branches, [part.users.lengths for part in adapters], activation)
    if chosen == "torch":
        parts = [segment.Part(*part[:6]) for part in adapters]
        if backend == "torch" or not any(segment.copies_pay(part) for part in parts):
            return segment.apply(x, residual, parts, activation)
    return reference.adapter(x, residual, adapters, activation)


def bind(adapters: Sequence[SiteAdapter | Later], activation: str) -> Callable[[Tensor, Tensor], Tensor]:
    """`adapter` as a function of x and residual alone, for weights that are applied many times (one token a call).

    Where the torch path runs it and nothing needs a gradient, all that depends on the weights alone is done here.
    Adapters that are `Later` are made in every call, from tensors as SiteAdapter has them, without scale.
    """
    ready = [part for part in adapters if isinstance(part, SiteAdapter)]
    if len(ready) < len(adapters):
        return bind_later(adapters, _finish, lambda x, residual, parts: adapter(x, residual, parts, activation))
    return _bind(ready, activation)


def _finish(made: Sequence[Tensor], scale: Tensor, users: BatchIndex) -> SiteAdapter:
    down, down_bias, up, up_bias, *norm = made
    return SiteAdapter(down, down_bias, up, up_bias, scale, users, *norm)


def _bind(adapters: Sequence[SiteAdapter], activation: str) -> Callable[[Tensor, Tensor], Tensor]:
    def run(x: Tensor, residual: Tensor) -> Tensor:
        return adapter(x, residual, adapters, activation)

    tensors = [tensor for part in adapters for tensor in part if isinstance(tensor, Tensor)]
    fixed = tensors and not any(tensor.requires_grad for tensor in tensors)
    if not fixed or tensors[0].device.type != "cpu" or _torch_cannot(adapters):
        return run
    prepared = segment.prepare([segment.Part(*part[:6]) for part in adapters], activation)
    checked: set[tuple[torch.Size, torch.dtype]] = set()

    def run_prepared(x: Tensor, residual: Tensor) -> Tensor:
        needed = torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad)
        if needed or torch.is_autocast_enabled("cpu"):
            return run(x, residual)
        if (x.shape, x.dtype) not in checked or residual.shape != x.shape or residual.dtype != x.dtype:
            _check(x, residual, adapters)
            checked.add((x.shape, x.dtype))
        return prepared(x, residual)

    return run_prepared


def _cast(
    dtype: torch.dtype, x: Tensor, residual: Tensor, adapters: Sequence[SiteAdapter]
) -> tuple[Tensor, Tensor, list[SiteAdapter]]:
    parts = [SiteAdapter._make(of.to(dtype) if isinstance(of, Tensor) else of for of in part) for part in adapters]
    return x.to(dtype), residual.to(dtype), parts


def _check(x: Tensor, residual: Tensor, adapters: Sequence[SiteAdapter]) -> None:
    if x.ndim != 3:
        raise KernelShapeError(f"x: expected (samples, tokens, size), got {tuple(x.shape)}")
    _same("residual", residual, x.shape, x)
    size = x.shape[2]
    for number, part in enumerate(adapters):
        name = f"adapters[{number}]"
        if part.down.ndim != 3:
            raise KernelShapeError(
                f"{name}.down: expected (conditions, size, bottleneck), got {tuple(part.down.shape)}"
            )
        groups, _, narrow = part.down.shape
        for field, shape in (
            ("down", (groups, size, narrow)),
            ("down_bias", (groups, narrow)),
            ("up", (groups, narrow, size)),
            ("up_bias", (groups, size)),
            ("scale", ()),
        ):
            _same(f"{name}.{field}", getattr(part, field), shape, x)
        for field in ("gain", "shift"):
            if getattr(part, field) is not None:
                _same(f"{name}.{field}", getattr(part, field), (groups, size), x)
        check_index(f"{name}.users", part.users, x, groups)


def check_index(name: str, index: BatchIndex, x: Tensor, groups: int) -> None:
    batch = len(x)
    if len(index.ids) != batch or index.groups != groups:
        raise KernelShapeError(
            f"{name}: expected {batch} samples and {groups} groups, got {len(index.ids)} and {index.groups}"
        )
    for field, tensor in (("ids", index.ids), ("lengths", index.lengths)):
        if tensor is not None and tensor.device != x.device:
            raise KernelDtypeError(f"{name}.{field}: expected on {x.device} as x is, got on {tensor.device}")


def _same(name: str, tensor: Tensor, shape: Sequence[int], x: Tensor) -> None:
    if tensor.shape != shape:
        raise KernelShapeError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise KernelDtypeError(
            f"{name}: expected {x.dtype} on {x.device} as x is, got {tensor.dtype} on {tensor.device}"
        )


def _torch_cannot(adapters: Sequence[SiteAdapter]) -> Exception | None:
    for number, part in enumerate(adapters):
        if part.gain is not None:
            return KernelUnavailableError(f'adapters[{number}].gain: a norm is only in backend="reference"')
        if part.users.spans is None:
            return KernelUnavailableError(
                f'adapters[{number}].users: backend="torch" needs an index made on the host (index_batch)'
            )
    return None


def _triton_cannot(x: Tensor, adapters: Sequence[SiteAdapter]) -> Exception | None:
    if x.numel() == 0:
        return KernelShapeError(f'x: backend="triton" expects at least one token, got {tuple(x.shape)}')
    for number, part in enumerate(adapters):
        groups, size, narrow = part.down.shape
        problem = triton_limit(x.dtype, size, narrow, f"adapters[{number}].down")
        if problem is not None:
            return problem
        if groups == 0:
            return KernelShapeError(f'adapters[{number}].down: backend="triton" expects a condition, got none')
        if part.gain is not None:
            return KernelUnavailableError(f'adapters[{number}].gain: a norm is only in backend="reference"')
    return None


def triton_limit(dtype: torch.dtype, size: int, narrow: int, name: str = "adapters.down") -> Exception | None:
    """Why the fused kernels do not run adapters of this type and size, or None."""
    if dtype not in TRITON_DTYPES:
        return KernelDtypeError(f'x: backend="triton" expects {", ".join(map(str, TRITON_DTYPES))}, got {dtype}')
    if size % 8:
        return KernelShapeError(f'x: backend="triton" expects a size that is a multiple of 8, got {size}')
    if not 1 <= narrow <= TRITON_BOTTLENECK:
        return KernelShapeError(
            f'{name}: backend="triton" expects a bottleneck of 1 to {TRITON_BOTTLENECK}, got {narrow}'
        )
    return None
