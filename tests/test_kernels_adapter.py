"""Adapters on a CPU: the reference and its derivatives, the torch path against it, and what is refused."""

from __future__ import annotations

import pytest
import torch
from adapter_cases import ACTIVATIONS, batches, by_formula, draw_adapter, error, leaves, make
from hypothesis import given, settings

from hyperpelt_ds.kernels import adapter, dispatch, generate, index_batch, low_rank
from hyperpelt_ds.kernels.adapter import SiteAdapter
from hyperpelt_ds.kernels.cases import ADAPTER_CASES, LOW_RANK_CASES, PREFIX_CASES, SUITES
from hyperpelt_ds.kernels.errors import KernelDtypeError, KernelShapeError, KernelUnavailableError
from hyperpelt_ds.kernels.index import Span, copied, index_on_device
from hyperpelt_ds.kernels.low_rank import SiteLowRank


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_has_first_and_second_derivatives(activation):
    generator = torch.Generator().manual_seed(3)
    x, residual = (torch.randn(3, 2, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    lengths = torch.tensor([2, 1, 2], dtype=torch.int32)
    one = draw_adapter(generator, [0, 1, -1], 2, 4, 3, lengths=lengths)
    two = draw_adapter(generator, [0, 0, 0], 1, 4, 2)

    def run(*tensors):
        parts = [SiteAdapter(*tensors[2:7], one.users), SiteAdapter(*tensors[7:], two.users)]
        return adapter(*tensors[:2], parts, activation, backend="reference")

    inputs = leaves(x, residual, [one, two])
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@settings(max_examples=150, deadline=None)
@given(batches(sizes=(1, 7, 8, 24, 33), narrows=(1, 8, 20, 33)))
def test_the_torch_path_equals_the_reference(case):
    x, residual, parts, activation, dy = make(case, torch.float64)
    y = adapter(x, residual, parts, activation, backend="torch")
    expected, gradients = by_formula(x, residual, parts, activation, dy)
    assert error(y, expected) < 1e-13
    for actual, wanted in zip(torch.autograd.grad(y, leaves(x, residual, parts), dy), gradients, strict=True):
        assert error(actual, wanted) < 1e-11


@pytest.mark.parametrize("case", ADAPTER_CASES[:6], ids=lambda case: case.name)
def test_float32_stays_within_a_millionth_on_the_shapes_that_are_timed(case):
    generator = torch.Generator().manual_seed(0)
    x, residual, dy = (torch.randn(case.samples, case.tokens, case.size, generator=generator) for _ in range(3))
    part = draw_adapter(generator, case.ids, case.groups, case.size, case.bottleneck, torch.float32, packed=True)
    x.requires_grad_(), residual.requires_grad_()
    y = adapter(x, residual, [part], "gelu")
    expected, gradients = by_formula(x, residual, [part], "gelu", dy)
    assert error(y, expected) < 1e-6
    *made, scale = torch.autograd.grad(y, leaves(x, residual, [part]), dy)
    for actual, wanted in zip(made, gradients, strict=False):
        assert error(actual, wanted) < 1e-6
    # the sum of dy (y - residual) cancels to near nothing, so that it is measured by what was added up
    assert abs(scale - gradients[-1]) < 1e-6 * dy.norm() * (expected - residual).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "ids", [[0] * 16, [n // 4 for n in range(16)], [n % 4 for n in range(16)], [*range(16)]], ids=str
)
def test_in_half_precision_errors_are_at_most_a_quarter_above_the_reference_s(ids, dtype):
    """Of everything but the scales' gradients: one number each, of terms that cancel, and near by luck or not."""
    generator = torch.Generator().manual_seed(0)
    x, residual, dy = (torch.randn(16, 9, 96, generator=generator).to(dtype) for _ in range(3))
    parts = [draw_adapter(generator, own, max(own) + 1, 96, 24, dtype, packed=True) for own in (ids, [0] * 16)]
    inputs = leaves(x.requires_grad_(), residual.requires_grad_(), parts)
    errors = []
    expected, gradients = by_formula(x, residual, parts, "gelu_new", dy)
    wanted = [expected, *gradients]
    for backend in ("torch", "reference"):
        y = adapter(x, residual, parts, "gelu_new", backend=backend)
        errors.append([error(*pair) for pair in zip([y, *torch.autograd.grad(y, inputs, dy)], wanted, strict=True)])
    with torch.no_grad():  # another way through the same slices
        assert error(adapter(x, residual, parts, "gelu_new", backend="torch"), expected) <= 1.25 * errors[1][0]
    for ours, theirs, of in zip(*errors, wanted, strict=True):
        assert of.numel() == 1 or ours <= 1.25 * theirs


def test_what_needs_no_gradient_gets_none_and_the_rest_is_the_same():
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(4, 3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    part = draw_adapter(generator, [0, 0, 1, -1], 2, 6, 3)
    fixed = SiteAdapter(*(tensor.detach() for tensor in part[:5]), part.users)
    needs = x.clone().requires_grad_()
    every = torch.autograd.grad(adapter(needs, residual, [part], "silu").sum(), [needs, *part[:5]])
    only_x = torch.autograd.grad(adapter(needs, residual, [fixed], "silu").sum(), needs)
    only_weights = torch.autograd.grad(adapter(x, residual, [part], "silu").sum(), part[:5])
    for one, two in zip(every, (*only_x, *only_weights), strict=True):
        assert torch.equal(one, two)
    assert not adapter(x, residual, [fixed], "silu").requires_grad


def test_inputs_that_are_views_and_gradients_that_are_expanded_are_handled():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)
    x = residual = whole.transpose(1, 2)
    part = draw_adapter(generator, [0, 1, 1], 2, 6, 3)
    made = [
        torch.autograd.grad(adapter(x, residual, [part], "gelu", backend=backend).sum(), part[:5])  # dy has stride 0
        for backend in ("torch", "reference")
    ]
    assert all(torch.allclose(one, two) for one, two in zip(*made, strict=True))


@pytest.mark.parametrize("ids", [[0] * 6, [0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5], [2, 0, 1, 0, 2, -1]])
def test_a_samples_answer_is_the_same_alone_to_the_last_bits(ids):
    """On a CPU the sum's order is the library's, by the size of the product, so that the last bits may differ."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(6, 5, 32, generator=generator) for _ in range(2))
    part = draw_adapter(generator, ids, 6, 32, 8, torch.float32)
    together = adapter(x, residual, [part], "relu")
    assert torch.equal(together, adapter(x, residual, [part], "relu"))
    for n, number in enumerate(ids):
        alone = part._replace(users=index_batch([number], groups=6))
        one = adapter(x[n : n + 1], residual[n : n + 1], [alone], "relu")
        assert torch.allclose(one[0], together[n], atol=1e-6)


def test_under_autocast_everything_is_in_its_type_and_gradients_keep_theirs():
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, 3, 8, generator=generator) for _ in range(2))
    part = draw_adapter(generator, [0, 1], 2, 8, 4, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapter(x, residual.bfloat16(), [part], "relu")
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.float().sum(), part.down)[0].dtype == torch.float32
    assert torch.allclose(y.float(), adapter(x, residual, [part], "relu"), atol=0.1)


def test_gradients_under_checkpointing_are_the_same():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 8, generator=generator).requires_grad_()
    part = draw_adapter(generator, [0, 0, 1, -1], 2, 8, 4, torch.float32)

    def run(x):
        return adapter(x, x, [part], "gelu")

    inputs = [x, *part[:5]]
    again = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    for one, two in zip(
        torch.autograd.grad(run(x).sum(), inputs), torch.autograd.grad(again.sum(), inputs), strict=True
    ):
        assert torch.equal(one, two)


def test_a_second_derivative_is_refused_by_the_written_out_backward_pass():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 4, generator=generator, dtype=torch.float64).requires_grad_()
    part = draw_adapter(generator, [0], 1, 4, 2)
    with pytest.raises(KernelUnavailableError, match='backend="reference"'):
        torch.autograd.grad(adapter(x, x, [part], "silu").sum(), x, create_graph=True)


def test_an_index_says_who_uses_what():
    found = index_batch([1, 0, 1, -1], groups=3)
    assert found.ids.tolist() == [1, 0, 1, -1] and found.order.tolist() == [3, 1, 0, 2]
    assert found.ptr.tolist() == [1, 2, 4, 4] and found.counts == (1, 2, 0) and not found.complete
    assert all(tensor.dtype == torch.int32 for tensor in found[:3])
    made = index_on_device(torch.tensor([1, 0, 1, -1]), groups=3)
    assert all(torch.equal(one, two) for one, two in zip(found[:3], made[:3], strict=True))
    assert made.counts is None and made.spans is None


@pytest.mark.parametrize(
    ("ids", "spans", "permuted"),
    [
        ([0, 0, 0], [(0, 1, 0, 3)], False),
        ([0, 0, 1, 1, 2, 2], [(0, 3, 0, 2)], False),
        ([0, 1, 2, 3], [(0, 4, 0, 1)], False),
        ([-1, -1, 0, 1, 1], [(0, 1, 2, 1), (1, 1, 3, 2)], False),
        ([1, 1, 0, 0], [(1, 1, 0, 2), (0, 1, 2, 2)], False),
        ([0, 1, 0, 1], [(0, 2, 0, 2)], True),
        ([0, -1, 0], [(0, 1, 1, 2)], True),
        ([5, 4, 3, 2, 1, 0], [(0, 6, 0, 1)], True),
    ],
)
def test_spans_are_slices_of_weights_and_samples(ids, spans, permuted):
    found = index_batch(ids)
    assert list(found.spans) == [Span(*span) for span in spans] and found.permuted == permuted


def test_copies_of_weights_give_them_the_sum_of_their_gradients_and_have_second_ones():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    condition = torch.tensor([2, 0, 2, 0])
    given = torch.randn(4, 2, 2, generator=generator, dtype=torch.float64)
    found, wanted = (
        torch.autograd.grad(made, weights, given)[0]
        for made in (copied(weights, condition), weights.index_select(0, condition))
    )
    assert torch.allclose(found, wanted) and (found[1] == 0).all()
    assert torch.autograd.gradgradcheck(lambda w: copied(w, condition), weights)


def test_bad_arguments_are_refused_by_name():
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    part = draw_adapter(generator, [0, 1], 2, 4, 3)
    for wrong, kind, name in (
        (part._replace(up=part.up.detach()[:, :2]), KernelShapeError, r"adapters\[0\]\.up: expected shape \(2, 3, 4\)"),
        (part._replace(down=part.down[0]), KernelShapeError, r"adapters\[0\]\.down"),
        (part._replace(scale=part.scale.detach().view(1)), KernelShapeError, r"adapters\[0\]\.scale"),
        (part._replace(up_bias=part.up_bias.float()), KernelDtypeError, r"adapters\[0\]\.up_bias.*float64"),
        (part._replace(users=index_batch([0, 1, 1])), KernelShapeError, r"adapters\[0\]\.users: expected 2 samples"),
        (
            part._replace(users=part.users._replace(ids=part.users.ids.to("meta"))),
            KernelDtypeError,
            r"adapters\[0\]\.users\.ids: expected on cpu as x is, got on meta",
        ),
        (part._replace(users=index_batch([0, 0])), KernelShapeError, r"adapters\[0\]\.users.*2 groups"),
        (part._replace(gain=torch.ones(2, 3)), KernelShapeError, r"adapters\[0\]\.gain"),
    ):
        with pytest.raises(kind, match=name):
            adapter(x, residual, [wrong], "relu")
    with pytest.raises(KernelShapeError, match="residual"):
        adapter(x, residual[:, :2], [part], "relu")
    with pytest.raises(KernelShapeError, match="x: expected"):
        adapter(x[0], residual, [part], "relu")
    with pytest.raises(KernelShapeError, match=r"deltas\[0\]\.users"):
        low_rank(x, residual, [SiteLowRank(part.down, part.up, index_batch([0]))])
    for wrong, kind, name in (
        (SiteLowRank(part.down, part.up[..., :2], part.users), KernelShapeError, r"deltas\[0\]\.up: expected .*3, 4"),
        (SiteLowRank(part.down[:, 1:], part.up, part.users), KernelShapeError, r"deltas\[0\]\.down"),
        (SiteLowRank(part.down, part.up.float(), part.users), KernelDtypeError, r"deltas\[0\]\.up.*float64"),
    ):
        with pytest.raises(kind, match=name):
            low_rank(x, residual, [wrong])
    with pytest.raises(KernelShapeError, match="x and output"):
        low_rank(x, residual[:, :2], [SiteLowRank(part.down, part.up, part.users)])
    hyper, weight, bias = torch.ones(1, 2, 4), torch.ones(5, 4), torch.ones(5)
    for wrong, kind, name in (
        ((hyper, weight[:, :3], bias), KernelShapeError, r"weight: expected shape \(5, 4\), got \(5, 3\)"),
        ((hyper, weight, bias[:4]), KernelShapeError, r"bias: expected shape \(5,\)"),
        ((hyper, weight.to("meta"), bias), KernelDtypeError, "weight: expected a tensor on cpu"),
    ):
        with pytest.raises(kind, match=name):
            generate(*wrong)
    for ids, message in (([0, 2], r"ids\[1\] is 2"), ([-2, 0], r"ids\[0\] is -2")):
        with pytest.raises(KernelShapeError, match=message):
            index_batch(ids, groups=2)
    for lengths in ([1], [1, -1], torch.tensor([1, -1])):
        with pytest.raises(KernelShapeError, match="lengths"):
            index_batch([0, 1], lengths)


def test_a_backend_that_cannot_run_the_call_is_never_replaced():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, generator=generator)
    part = draw_adapter(generator, [0, 1], 2, 8, 3, torch.float32)
    with pytest.raises(KernelUnavailableError, match="triton"):
        adapter(x, x, [part], "relu", backend="triton")
    normed = part._replace(gain=torch.ones(2, 8), shift=torch.zeros(2, 8))
    with pytest.raises(KernelUnavailableError, match=r"adapters\[0\]\.gain"):
        adapter(x, x, [normed], "relu", backend="torch")
    with pytest.raises(KernelUnavailableError, match=r"adapters\[0\]\.users"):
        on_device = part._replace(users=index_on_device(torch.tensor([0, 1]), 2))
        adapter(x, x, [on_device], "relu", backend="torch")
    with pytest.raises(ValueError, match="backend"):
        adapter(x, x, [part], "relu", backend="cuda")


def test_a_process_without_triton_says_so(monkeypatch):
    monkeypatch.setattr(dispatch, "_HAS_TRITON", False)
    with pytest.raises(KernelUnavailableError, match="not installed"):
        dispatch.choose("triton", torch.ones(1), lambda: None, lambda: None)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_it_is_one_graph_for_every_shape_under_torch_compile(backend):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(4, 5, 8, generator=generator) for _ in range(2))
    one, two = (draw_adapter(generator, ids, 2, 8, 3, torch.float32) for ids in ([0, 0, 1, 1], [1, -1, 0, 1]))

    def run(x, residual, *tensors):
        parts = [SiteAdapter(*tensors[:5], one.users), SiteAdapter(*tensors[5:], two.users)]
        return adapter(x, residual, parts, "gelu", backend=backend).sin().sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 3, 2):
        inputs = [x[:, :tokens].clone().requires_grad_(), residual[:, :tokens], *one[:5], *two[:5]]
        wanted = [inputs[0], *inputs[2:]]
        for a, b in zip(
            torch.autograd.grad(compiled(*inputs), wanted), torch.autograd.grad(run(*inputs), wanted), strict=True
        ):
            assert torch.allclose(a, b, atol=1e-5)


def test_suites_name_cases_that_exist():
    cases = [case.name for case in (*ADAPTER_CASES, *LOW_RANK_CASES, *PREFIX_CASES)]
    assert {name for names in SUITES.values() for name in names} == set(cases) and len(set(cases)) == len(cases)
