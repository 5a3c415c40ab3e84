"""What `prefix_attention` refuses, by the argument that does not fit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hyperpelt_ds.kernels.prefix_attention.records import AnyPrefix, SitePrefix


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[AnyPrefix],
    mask: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Raises ValueError that names the argument, what it is and what was expected. Looks at shapes alone."""
    batch, heads, length, size = query.shape
    key_heads, keys = key.shape[1:3]
    if heads % key_heads:
        raise ValueError(f"query: {heads} heads do not divide into groups for the {key_heads} heads of key")
    _expect("key", key, (batch, key_heads, keys, size))
    _expect("value", value, (batch, key_heads, keys, size))
    for number, prefix in enumerate(prefixes):
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
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(part.shape)}")


def _expect(name: str, part: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(part.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(part.shape)}")
