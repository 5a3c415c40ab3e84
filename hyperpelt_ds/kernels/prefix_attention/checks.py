"""What `prefix_attention` refuses, by the argument that does not fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperpelt_ds.kernels.errors import KernelDtypeError, KernelShapeError
from hyperpelt_ds.kernels.prefix_attention.records import AnyPrefix, SitePrefix


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[AnyPrefix],
    mask: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Raises KernelShapeError or KernelDtypeError that names the argument, what it is and what was expected.

    A prefix may be of another type than the query, whose type it is then given; under autocast so may keys and values.
    """
    for name, states in (("query", query), ("key", key)):
        if states.ndim != 4:
            raise KernelShapeError(f"{name}: expected (B, heads, tokens, size), got {tuple(states.shape)}")
    batch, heads, length, size = query.shape
    key_heads, keys = key.shape[1:3]
    if heads % key_heads:
        raise KernelShapeError(f"query: {heads} heads do not divide into groups for the {key_heads} heads of key")
    _expect("key", key, (batch, key_heads, keys, size))
    _expect("value", value, (batch, key_heads, keys, size))
    mixed = torch.is_autocast_enabled(query.device.type)
    _alike("key", key, query, None if mixed else query.dtype)
    _alike("value", value, query, None if mixed else query.dtype)
    _alike("mask", mask, query, torch.bool)
    _alike("bias", bias, query)
    for number, prefix in enumerate(prefixes):
        for field, part in zip(prefix._fields, prefix, strict=True):
            _alike(f"prefixes[{number}].{field}", part if isinstance(part, Tensor) else None, query)
        where, width = f"prefixes[{number}]", key_heads * size
        _expect(f"{where}.rows", prefix.rows, (batch,))
        if isinstance(prefix, SitePrefix):
            _expect(f"{where}.keys", prefix.keys, (*prefix.keys.shape[:2], width))
            _expect(f"{where}.values", prefix.values, prefix.keys.shape)
        else:
            _expect(f"{where}.weight", prefix.weight, (2 * width, prefix.hyper.shape[-1]))
            _expect(f"{where}.bias", prefix.bias, (2 * width,))
    for name, part, allowed in (("mask", mask, (1,)), ("bias", bias, (1, heads))):
        if part is not None and not (
            part.ndim == 4
            and part.shape[0] in (1, batch)
            and part.shape[1] in allowed
            and tuple(part.shape[2:]) == (length, keys)
        ):
            expected = f"({batch} or 1, {' or '.join(map(str, allowed))}, {length}, {keys})"
            raise KernelShapeError(f"{name}: expected shape {expected}, got {tuple(part.shape)}")


def _alike(name: str, part: Tensor | None, query: Tensor, dtype: torch.dtype | None = None) -> None:
    """On the query's device, and of a type where it must be."""
    if part is None:
        return
    if part.device != query.device:
        raise KernelDtypeError(f"{name}: expected a tensor on {query.device} as query is, got one on {part.device}")
    if dtype is not None and part.dtype != dtype:
        raise KernelDtypeError(f"{name}: expected {dtype}, got {part.dtype}")


def _expect(name: str, part: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(part.shape) != tuple(shape):
        raise KernelShapeError(f"{name}: expected shape {tuple(shape)}, got {tuple(part.shape)}")
