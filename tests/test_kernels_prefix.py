"""The CUDA kernels that prefix attention is merged from, without a GPU: a stand-in that asks for what they ask for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from prefix_cases import calls
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hyperpelt_ds.kernels.prefix_attention import (
    CUDA,
    MERGED,
    SitePrefix,
    SiteRows,
    merged,
    prefix_attention,
    reference,
    score_bias,
)
from hyperpelt_ds.kernels.prefix_attention.flash import BLOCK, for_cuda

aten = torch.ops.aten


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = scale * query.transpose(1, 2) @ key.permute(0, 2, 3, 1)
    return scores if bias is None else scores + bias


def _known(operator: Any, *args: Any, **kwargs: Any) -> None:
    """The real operator takes these arguments, as far as can be told where it has no kernel."""
    with pytest.raises(NotImplementedError, match="CPU"):
        operator(*args, **kwargs)


def _aligned(*tensors: Tensor | None) -> None:
    """Last numbers side by side, rows and heads at multiples of eight (16 bytes of half precision)."""
    for tensor in tensors:
        if tensor is not None:
            strides = [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
            assert tensor.shape[-1] == 1 or strides.pop() == 1
            assert all(stride % 8 == 0 for stride in strides) and tensor.storage_offset() % 8 == 0


def _forward(query, key, value, bias, *rest, scale, strict=False):
    _known(aten._efficient_attention_forward, query, key, value, bias, *rest, scale=scale)
    assert rest == (None, None, None, None, 0.0, 0, True)
    batch, length, heads, _ = query.shape
    if bias is not None:
        assert bias.shape == (batch, heads, length, key.shape[1]) and bias.dtype == query.dtype
    if strict:
        _aligned(query, key, value, bias)
    scores = _scores(query, key, bias, scale) * 1.4427
    nothing = (scores == -math.inf).all(-1, keepdim=True)  # gives 0, with a sum of 1
    scores = scores.masked_fill(nothing, 0.0) / 1.4427
    output = (scores.softmax(-1) @ value.transpose(1, 2)).masked_fill(nothing, 0.0)
    logs = query.new_full((batch, heads, -(-length // BLOCK) * BLOCK), math.inf)
    logs[..., :length] = scores.logsumexp(-1).masked_fill(nothing[..., 0], 0.0)
    unused = torch.empty((), dtype=torch.int64)
    return output.transpose(1, 2).contiguous(), logs, unused, unused, length, key.shape[1]


def _backward(gradient, query, key, value, bias, output, *rest, strict=False, **options):
    _known(aten._efficient_attention_backward, gradient, query, key, value, bias, output, *rest, **options)
    length, logs = query.shape[1], rest[4]
    assert rest[:4] == (None, None, length, key.shape[1])
    assert (rest[5], *rest[8:]) == (0.0, 0, False)  # no dropout, no flag for a mask, no gradient of the bias
    assert options.keys() == {"scale", "num_splits_key"} and options["num_splits_key"] == 1
    assert gradient.is_contiguous() and output.is_contiguous(), "else it copies, or reads the wrong numbers"
    assert logs.is_contiguous() and logs.shape[2] % BLOCK == 0 and (logs[..., length:] == math.inf).all()
    if strict:
        _aligned(query, key, value, bias)
    scale = options["scale"]
    shares = (_scores(query, key, bias, scale) - logs[..., :length].unsqueeze(-1)).exp()
    given, q, k, v, out = (part.transpose(1, 2) for part in (gradient, query, key, value, output))
    scores = shares * (given @ v.mT - (given * out).sum(-1, keepdim=True)) * scale
    made = scores @ k, scores.mT @ q, shares.mT @ given
    return *(part.transpose(1, 2).contiguous() for part in made), None


STAND_IN = for_cuda(_forward, _backward)


@settings(max_examples=60, deadline=None)
@given(calls(groups=(1,)))
def test_merged_from_the_cuda_kernels_it_equals_the_formula_with_all_gradients(call):
    query, key, value, prefixes, mask, bias, scale = call
    expected, inputs = reference(*call), call.inputs()
    made = merged(STAND_IN, query, key, value, prefixes, score_bias(mask, bias, query.dtype), scale)
    assert torch.allclose(made, expected, rtol=0, atol=1e-10)
    out = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = dict(allow_unused=True, materialize_grads=True)
    for one, two in zip(
        torch.autograd.grad(made, inputs, out, **options), torch.autograd.grad(expected, inputs, out, **options),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(one, two, rtol=1e-10, atol=1e-10)


def _call(dtype: torch.dtype, device: str = "cpu", keys: int = 13, heads: int = 4, groups: int = 1) -> tuple[Any, ...]:
    """Three samples of five queries with two branches, the last without an image; a mask and a bias of odd width."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_()

    torch.manual_seed(0)
    query, width = randn(3, 5, heads * groups, 8).transpose(1, 2), heads * 8
    key, value = (randn(3, keys, heads, 8).transpose(1, 2) for _ in range(2))
    task = SitePrefix(randn(2, 3, width), randn(2, 3, width), torch.tensor([0, 0, 1], device=device), randn())
    image = SiteRows(randn(2, 7, 16), randn(2 * width, 16), randn(2 * width), torch.tensor([1, 0, -1], device=device))
    mask = (torch.rand(3, 1, 5, keys, device=device) < 0.7).logical_and(torch.arange(keys, device=device) != 2)
    bias = torch.randn(1, heads * groups, 5, keys, dtype=dtype, device=device)
    return query, key, value, [task, image], mask, bias, 0.4


@pytest.mark.parametrize("keys", [1, 13, 16])
def test_the_kernels_get_rows_where_they_can_read_them(keys):
    strict = for_cuda(
        lambda *args, **options: _forward(*args, **options, strict=True),
        lambda *args, **options: _backward(*args, **options, strict=True),
    )
    *call, mask, bias, scale = _call(torch.float32, keys=keys)
    made = merged(strict, *call, score_bias(mask, bias, torch.float32), scale)
    assert torch.allclose(made, reference(*call, mask, bias, scale), atol=1e-5)
    made.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_query_that_sees_no_key_gets_its_prefix_alone_though_scores_are_multiplied(dtype):
    query, key, value, prefixes, mask, bias, scale = _call(dtype)
    added = score_bias(torch.zeros_like(mask), bias, dtype)
    made = merged(STAND_IN, query, key, value, prefixes[:1], added, scale)
    prefix = prefixes[0]
    keys, values = (part[prefix.rows].unflatten(-1, (4, 8)).transpose(1, 2) for part in prefix[:2])
    assert torch.allclose(made, (scale * query @ keys.mT).softmax(-1) @ values, atol=1e-6)
    assert all(part.isfinite().all() for part in torch.autograd.grad(made.sum(), [query, key, prefix.keys]))


@pytest.mark.parametrize("grad", [True, False], ids=["training", "decoding"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", CUDA.dtypes, ids=str)
def test_on_a_gpu_that_is_not_there_types_and_shapes_fit(dtype, groups, grad, monkeypatch):
    run: list[Tensor] = []

    def forward(*args, **options):
        run.append(args[0])
        return aten._efficient_attention_forward(*args, **options)

    monkeypatch.setitem(MERGED, "cuda", for_cuda(forward))
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        call = _call(dtype, "cuda", groups=groups)
        output = prefix_attention(*call)
        assert output.requires_grad == grad and output.device.type == "cuda"
        assert (output.shape, output.dtype) == (call[0].shape, dtype)
    assert len(run) == 3 and {query.device.type for query in run} == {"cuda"}, "keys, and each branch"


@pytest.mark.parametrize(
    "dtype, sizes, taken",
    [
        (torch.bfloat16, [64, 64], True),
        (torch.bfloat16, [64, 20], False),
        (torch.float32, [12], False),
        (torch.float64, [64], False),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_run_is_left_to_others(dtype, sizes, taken):
    assert CUDA.takes(dtype, sizes) == taken


def test_until_it_ran_on_a_gpu_nothing_is_merged_there():
    """docs/kernels.md says what the first run decides; then this goes, with the way that lost."""
    assert list(MERGED) == ["cpu"]
