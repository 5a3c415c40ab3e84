"""Torch's own attention kernels behind one contract, a device each: attention that gives the log of its scores' sum,
and a backward pass that takes an output and such a log from elsewhere. With these, parts of one softmax are merged.

The CUDA kernels are called as their headers in torch 2.11 and 2.14 ask for it. No GPU has run this yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Flash(NamedTuple):
    """One device's kernels. query is (B, H, T, d), key and value (B, H, T', d), of any strides but the last.

    forward(query, key, value, bias, scale) gives the output (B, H, T, d) and the log of the sum (B, H, T) in at least
    32 bits. backward(gradient, query, key, value, bias, output, logs, scale) gives the gradients of query, key and
    value; gradient and output lie in memory as (B, T, H, d). bias (B, H, T, T') or None is added to the scores.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, float], tuple[Tensor, ...]]
    dtypes: tuple[torch.dtype, ...]
    multiple: int
    """What a head's size must be a multiple of, and the place in memory where a row of a bias begins."""
    pays: Callable[[int, int, int], bool]
    """Whether merging costs less than copying in training, for so many queries, keys and prefix rows."""

    def takes(self, dtype: torch.dtype, sizes: Sequence[int]) -> bool:
        """Whether it runs for numbers of this type and heads of these sizes."""
        return dtype in self.dtypes and not any(size % self.multiple for size in sizes)

    def in_place(self, bias: Tensor) -> Tensor:
        """The bias with its rows where they may begin; a copy if they are elsewhere."""
        if all(stride % self.multiple == 0 for stride in (*bias.stride()[:-1], bias.storage_offset())):
            return bias
        return F.pad(bias, (0, -bias.shape[-1] % self.multiple))[..., : bias.shape[-1]]


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, logs = kernel(query, key, value, attn_mask=bias, scale=scale)
    return output, logs


def _gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    logs: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    made: tuple[Tensor, ...] = kernel(
        gradient, query, key, value, output, logs, 0.0, False, attn_mask=bias, scale=scale
    )
    return made


def _pays(queries: int, keys: int, rows: int) -> bool:
    """Merging works on every query, concatenation on every key and row.

    As measured on one thread (8 heads of 64, 16 samples, forward and backward; time of concatenation over that of
    merging): 8 queries on 32 keys and 16 rows of one condition 0.97, of eight 1.16; on 64 keys 1.39 and 1.10; 32
    queries and keys with 49 rows each 1.2, with 16 rows 0.83; 64 and 16 0.93; 256 and 16 0.93.
    """
    return keys + rows > 2 * queries


CPU = Flash(_attend, _gradients, (torch.float32, torch.float64, torch.bfloat16, torch.float16), 1, _pays)

BLOCK = 32
"""The CUDA backward kernel reads logs in blocks of so many queries, and wants infinity past the last."""


def for_cuda(
    forward: Any = torch.ops.aten._efficient_attention_forward,
    backward: Any = torch.ops.aten._efficient_attention_backward,
) -> Flash:
    """The kernels that torch calls memory-efficient: of those that give logs, the ones that take a bias on every GPU.

    They work on (B, T, H, d). The backward one is told not to split keys among programs, which would add up a query's
    gradient in no fixed order. Before anything else they multiply a score by 1.44 (log2 of e), and a query whose scores
    are all minus infinity by then gets a sum of 1: hence `score_bias` hides with half the lowest number.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        turned = (part.transpose(1, 2) for part in (query, key, value))
        output, logs, *_ = forward(*turned, bias, None, None, None, None, 0.0, 0, True, scale=scale)
        return output.transpose(1, 2), logs[..., : query.shape[2]]

    def gradients(
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        output: Tensor,
        logs: Tensor,
        scale: float,
    ) -> tuple[Tensor, ...]:
        queries, keys = query.shape[2], key.shape[2]
        gradient, query, key, value, output = (p.transpose(1, 2) for p in (gradient, query, key, value, output))
        room = logs.new_full((*logs.shape[:2], -(-queries // BLOCK) * BLOCK), math.inf)
        room[..., :queries] = logs
        unused = torch.empty((), dtype=torch.int64)  # where dropout would read the state of its generator
        made = backward(
            gradient, query, key, value, bias, output, None, None, queries, keys, room, 0.0, unused, unused, 0, False,
            scale=scale, num_splits_key=1,
        )  # fmt: skip
        return tuple(part.transpose(1, 2) for part in made[:3])

    return Flash(attend, gradients, (torch.bfloat16, torch.float16, torch.float32), 8, lambda *_: True)


CUDA = for_cuda()
