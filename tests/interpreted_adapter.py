"""The Triton kernels in Triton's interpreter; run by test_kernels_triton.py in a process of its own.

The variable that turns the interpreter on must be set before Triton is first imported.
bfloat16 is held to 1e-2 here: the interpreter's store truncates where a GPU rounds to nearest.
"""

from __future__ import annotations

import os

import pytest
import torch
from adapter_cases import ACTIVATIONS, batches, by_formula, draw_adapter, error, leaves, make
from hypothesis import given, settings
from tiny import tiny_batch, tiny_hypernet, tiny_model, tiny_modules
from torch import library

from hyperpelt_ds.backbones import Backbone
from hyperpelt_ds.kernels import adapter, dispatch, index_batch
from hyperpelt_ds.kernels.adapter import fused
from hyperpelt_ds.kernels.errors import KernelDtypeError, KernelShapeError, KernelUnavailableError

assert fused.INTERPRETED.value
EXAMPLES = int(os.environ.get("KERNEL_EXAMPLES", 8))
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True, scope="module")
def poison():
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all() and torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _compare(x, residual, parts, activation, dy):
    y = adapter(x, residual, parts, activation, backend="triton")
    made = [y, *torch.autograd.grad(y, leaves(x, residual, parts), dy)]
    expected, gradients = by_formula(x, residual, parts, activation, dy)
    scales = {2 + 5 * n + 5 for n in range(len(parts))}
    for n, (actual, wanted) in enumerate(zip(made, [expected, *gradients], strict=True)):
        assert not actual.isnan().any()
        if n in scales:  # may cancel to near nothing: measured by what was added up
            difference = (expected - residual).norm() * dy.double().norm()
            assert abs(actual.double() - wanted) <= 4 * TOLERANCES[x.dtype] * difference + 1e-12
        else:
            limit = 2 * TOLERANCES[x.dtype]
            if error(actual, wanted) >= limit:  # in gelu's tail 1 + erf cancels, and the bits left are each erf's own
                plain_y, plain = by_formula(x, residual, parts, activation, dy, x.dtype)
                limit = 32 * error([plain_y, *plain][n], wanted)
            assert error(actual, wanted) < limit


@settings(max_examples=EXAMPLES, deadline=None)
@given(batches(sizes=(8, 24, 72), narrows=(1, 8, 20, 33)))
def test_kernels_equal_the_reference_in_float32(case):
    _compare(*make(case, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_equal_the_reference_in_half_precision(dtype, activation):
    case = 19, 40, [19, 0, 7, 1], [([0, 2, 2, -1], 3, 24), ([1, -1, 0, 1], 2, 9)], activation, 4
    _compare(*make(case, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [16, 33, 70])
def test_every_tile_of_the_table_is_right(tokens):
    for narrow in (16, 130):
        case = tokens, 136, None, [([0, 1, 1], 2, narrow), ([0, 1, 2], 3, 16)], "relu", 1
        _compare(*make(case, torch.float32))


def test_many_tokens_of_one_condition_are_shared_and_added_in_a_fixed_order():
    generator = torch.Generator().manual_seed(0)
    x, residual, dy = (torch.randn(8, 96, 40, generator=generator) for _ in range(3))
    part = draw_adapter(generator, [0] * 8, 1, 40, 20, torch.float32)
    assert fused.splits(1, 2, 8 * 96, fused.weight_tile(32, 4)) > 1
    _compare(x.requires_grad_(), residual.requires_grad_(), [part], "silu", dy)


def test_answers_repeat_and_do_not_depend_on_the_rest_of_the_batch_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        case = 37, 48, [37, 20, 0, 5], [([0, 2, 2, -1], 3, 24), ([1, -1, 0, 1], 2, 9)], "gelu", 5
        x, residual, parts, activation, dy = make(case, dtype)
        runs = []
        for _ in range(2):
            y = adapter(x, residual, parts, activation, backend="triton")
            runs.append([y, *torch.autograd.grad(y, leaves(x, residual, parts), dy)])
        assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
        for n in range(4):
            lengths = parts[0].users.lengths[n : n + 1]  # one tensor, so that both branches still share a launch
            users = [index_batch([int(p.users.ids[n])], lengths, groups=p.users.groups) for p in parts]
            alone = [part._replace(users=user) for part, user in zip(parts, users, strict=True)]
            one = adapter(x[n : n + 1], residual[n : n + 1], alone, activation, backend="triton")
            assert torch.equal(one[0], runs[0][0][n])
        order = torch.tensor([2, 0, 3, 1])
        lengths = parts[0].users.lengths[order]
        moved = [p._replace(users=index_batch(p.users.ids[order], lengths, groups=p.users.groups)) for p in parts]
        assert torch.equal(adapter(x[order], residual[order], moved, activation, backend="triton"), runs[0][0][order])


def test_three_branches_and_different_lengths_take_a_launch_each():
    generator = torch.Generator().manual_seed(0)
    x, residual, dy = (torch.randn(3, 5, 16, generator=generator) for _ in range(3))
    parts = [
        draw_adapter(generator, [0, 1, 1], 2, 16, 4, torch.float32, lengths)
        for lengths in (None, None, torch.tensor([5, 0, 2], dtype=torch.int32))
    ]
    _compare(x.requires_grad_(), residual.requires_grad_(), parts, "relu", dy)
    _compare(x, residual, parts[1:], "relu", dy)


def test_only_what_is_needed_is_computed():
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, 5, 16, generator=generator) for _ in range(2))
    part = draw_adapter(generator, [0, 1], 2, 16, 4, torch.float32)
    fixed = part._make(t.detach() if isinstance(t, torch.Tensor) else t for t in part)
    needs = x.clone().requires_grad_()
    every = torch.autograd.grad(adapter(needs, residual, [part], "relu", backend="triton").sum(), [needs, *part[:5]])
    only_x = torch.autograd.grad(adapter(needs, residual, [fixed], "relu", backend="triton").sum(), needs)
    only_w = torch.autograd.grad(adapter(x, residual, [part], "relu", backend="triton").sum(), part[:5])
    assert all(torch.equal(one, two) for one, two in zip(every, (*only_x, *only_w), strict=True))


def _flat(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(3, 5, 16, generator=generator) for _ in range(2))
    one = draw_adapter(generator, [0, 1, 1], 2, 16, 4, torch.float32)
    two = draw_adapter(generator, [0, -1, 2], 3, 16, 9, torch.float32)
    return x, residual, one, two, [t.detach() for part in (one, two) for t in (*part[:5], *part.users[:3])]


def test_the_operators_are_registered_as_torch_wants_them():
    x, residual, *_, tensors = _flat()
    operators = torch.ops.hyperpelt
    library.opcheck(operators.adapter_forward.default, (x, residual, tensors, None, "relu"))
    y, z = operators.adapter_forward(x, residual, tensors, None, "relu")
    for inputs, weights in ((True, True), (False, True), (True, False)):
        library.opcheck(operators.adapter_backward.default, (y, x, z, tensors, None, "relu", inputs, weights))


@pytest.mark.slow
def test_it_is_one_graph_for_every_shape_under_torch_compile():
    x, residual, one, two, _ = _flat()

    def run(x, residual, *tensors):
        parts = [one._make((*tensors[:5], *one[5:])), two._make((*tensors[5:], *two[5:]))]
        return adapter(x, residual, parts, "gelu_new", backend="triton").sin().sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 3, 2):
        inputs = [x[:, :tokens].clone().requires_grad_(), residual[:, :tokens], *one[:5], *two[:5]]
        leaf = [inputs[0], *one[:5], *two[:5]]
        for a, b in zip(
            torch.autograd.grad(compiled(*inputs), leaf), torch.autograd.grad(run(*inputs), leaf), strict=True
        ):
            assert torch.allclose(a, b, atol=1e-6)


def test_autocast_and_checkpointing():
    x, residual, one, two, _ = _flat()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapter(x, residual, [one, two], "relu", backend="triton")
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.float().sum(), one.down)[0].dtype == torch.float32

    def run(x):
        return adapter(x, residual, [one, two], "relu", backend="triton")

    x.requires_grad_()
    inputs = [x, *one[:5], *two[:5]]
    again = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(run(x).sum(), inputs), torch.autograd.grad(again.sum(), inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["t5", "bart", "llama"])
def test_a_model_has_the_same_loss_and_gradients_with_every_backend(kind, monkeypatch):
    outcomes = []
    for backend in ("reference", "torch", "triton"):
        monkeypatch.setattr(dispatch, "choose", lambda *_, own=backend: own)
        backbone = Backbone(tiny_model(kind), None, tiny_modules(bottleneck=8))
        network, batch = tiny_hypernet(backbone), tiny_batch(backbone.model)
        logits = backbone.forward(network(batch), batch.input_ids, batch.attention_mask, batch.labels, batch.targets)
        logits.logsumexp(-1).sum().backward()
        outcomes.append([logits, *(parameter.grad for parameter in network.parameters() if parameter.grad is not None)])
    for other in outcomes[1:]:
        assert all(error(one, two) < 1e-5 for one, two in zip(other, outcomes[0], strict=True))


def test_a_second_derivative_names_the_backend_that_has_one():
    x, residual, one, _, _ = _flat()
    first = torch.autograd.grad(
        adapter(x.requires_grad_(), residual, [one], "silu", backend="triton").sum(), x, create_graph=True
    )[0]
    with pytest.raises(KernelUnavailableError, match='backend="reference"'):
        first.sum().backward()


def test_what_the_kernels_do_not_do_is_refused_by_name():
    x, residual, one, _, _ = _flat()
    for wrong, kind, message in (
        (one._replace(gain=torch.ones(2, 16), shift=torch.ones(2, 16)), KernelUnavailableError, r"adapters\[0\]\.gain"),
        (
            draw_adapter(torch.Generator(), [0, 1, 1], 2, 16, 257, torch.float32),
            KernelShapeError,
            r"adapters\[0\]\.down",
        ),
    ):
        with pytest.raises(kind, match=message):
            adapter(x, residual, [wrong], "relu", backend="triton")
    odd = draw_adapter(torch.Generator(), [0, 1, 1], 2, 12, 4, torch.float32)
    with pytest.raises(KernelShapeError, match=r"x: .*multiple of 8, got 12"):
        adapter(x[:, :, :12], residual[:, :, :12], [odd], "relu", backend="triton")
    double = one._make(t.detach().double() if isinstance(t, torch.Tensor) else t for t in one)
    with pytest.raises(KernelDtypeError, match=r"x: .*float64"):
        adapter(x.double(), residual.double(), [double], "relu", backend="triton")
