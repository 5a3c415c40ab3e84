"""Frozen linear maps with int8 weights, one scale a row, as torchao keeps them; activations stay as they are.

It must not know which model the maps belong to, nor what is added to their output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Parts = dict[str, Tensor]


def quantize(blocks: Iterable[nn.Module]) -> None:
    """Turns the weight of every linear map in `blocks` into int8; ValueError where torchao is missing.

    Embeddings and what gives logits, which are often one matrix, are in no block.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError(
            f"model.quantize: 'int8' needs the package torchao ({error}); pip install 'hyperpelt-ds[int8]'"
        ) from error
    for block in blocks:
        quantize_(block, Int8WeightOnlyConfig(version=2))
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.__class__ = _Int8Linear  # in place: hooks and whoever holds the module go on with it


def parts_of(weight: Tensor) -> tuple[Parts, Callable[[Parts], Tensor]]:
    """The plain tensors that a weight consists of, by name, and what makes the weight from such tensors."""
    if not is_traceable_wrapper_subclass(weight):
        return {"": weight.detach()}, lambda parts: parts[""]
    names, context = weight.__tensor_flatten__()
    kind: Any = type(weight)
    size, stride = weight.shape, weight.stride()
    parts = {name: getattr(weight, name) for name in names}
    return parts, lambda parts: cast(Tensor, kind.__tensor_unflatten__(parts, context, size, stride))


class _Int8Linear(nn.Linear):
    """Keeps int8 for the backward pass. torchao 0.18 alone keeps each weight as it was multiplied, in full precision
    (tests/test_int8.py), so that a step would hold the whole model as if it were not quantised."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _FrozenLinear.apply(x, self.weight, self.bias))


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        parts, ctx.rebuild = parts_of(weight)
        ctx.names = list(parts)
        ctx.save_for_backward(*parts.values())
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.rebuild(dict(zip(ctx.names, ctx.saved_tensors, strict=True)))
        return gradients[0] @ weight.dequantize().to(gradients[0].dtype), None, None
