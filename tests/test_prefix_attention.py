"""Attention with prefixes: every way of computing it against the formula, in float64 unless said otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from prefix_cases import Call, calls
from torch import Tensor

from hyperpelt_ds.kernels.errors import KernelDtypeError, KernelShapeError
from hyperpelt_ds.kernels.prefix_attention import (
    CPU,
    SitePrefix,
    SiteRows,
    Spread,
    attention,
    concatenated,
    explicit,
    merged,
    prefix_attention,
    prefix_share,
    reference,
    score_bias,
    share,
    spread,
    spread_of,
)


def ways(call: Call) -> dict[str, Tensor]:
    """The output of every way that can do this."""
    query, key, value, prefixes, mask, bias, scale = call
    added = score_bias(mask, bias, query.dtype)
    made = [p.materialised() if isinstance(p, SiteRows) else p for p in prefixes]
    found = {
        "dispatched": prefix_attention(*call),
        "concatenated": concatenated(query, key, value, made, added, scale, 0.0),
    }
    if query.shape[1] == key.shape[1]:
        found["explicit"] = explicit(query, key, value, prefixes, added, scale, 0.0)
        found["merged"] = merged(CPU, query, key, value, prefixes, added, scale)
        found["merged, spread before"] = merged(CPU, query, key, value, [spread(p) for p in prefixes], added, scale)
        found["merged, made before"] = merged(CPU, query, key, value, made, added, scale)
    return found


@settings(max_examples=80, deadline=None)
@given(calls())
def test_every_way_and_both_forms_equal_the_formula_with_all_gradients(call):
    expected, inputs = reference(*call), call.inputs()
    out = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings = dict(allow_unused=True, materialize_grads=True)
    gradients = torch.autograd.grad(expected, inputs, out, **settings)
    for name, actual in ways(call).items():
        assert torch.allclose(actual, expected, rtol=0, atol=1e-10), name
        for one, two in zip(
            torch.autograd.grad(actual, inputs, out, retain_graph=True, **settings), gradients, strict=True
        ):
            assert torch.allclose(one, two, rtol=1e-10, atol=1e-10), name


@settings(max_examples=40, deadline=None)
@given(calls())
def test_without_gradients_the_result_is_the_same(call):
    with torch.no_grad():
        alone = prefix_attention(*call)
    assert torch.allclose(alone, prefix_attention(*call), rtol=0, atol=1e-12)


def small(form: str, **changes: Any) -> Call:
    """Three samples, of which the last has no prefix; two conditions of three rows."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    rows = torch.tensor([1, 0, -1])
    prefix = (
        SitePrefix(randn(2, 3, 4), randn(2, 3, 4), rows, randn())
        if form == "materialised"
        else SiteRows(randn(2, 3, 2), randn(8, 2), randn(8), rows, randn())
    )
    call = Call(randn(3, 2, 2, 2), randn(3, 2, 4, 2), randn(3, 2, 4, 2), [prefix], None, None, 0.7)
    return call._replace(**changes)


FORMS = ("materialised", "absorbed")


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_finite_differences(form):
    call = small(form)

    def attend(query, key, value, *parts):
        prefix = type(call.prefixes[0])(*parts[:-1], call.prefixes[0].rows, parts[-1])
        return prefix_attention(query, key, value, [prefix], None, None, 0.7)

    assert torch.autograd.gradcheck(attend, call.inputs())


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_can_be_differentiated_twice(form):
    call = small(form)

    def attend(query, *parts):
        prefix = type(call.prefixes[0])(*parts[:-1], call.prefixes[0].rows, parts[-1])
        return reference(query, call.key[:, :, :2].detach(), call.value[:, :, :2].detach(), [prefix], None, None, 0.7)

    assert torch.autograd.gradgradcheck(attend, [call.query, *call.inputs()[3:]])


@pytest.mark.parametrize("form", FORMS)
def test_no_position_sees_its_future_and_every_row_of_every_prefix_matters(form):
    mask = torch.ones(4, 4, dtype=torch.bool).tril().view(1, 1, 4, 4)
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(3, 2, 4, 2, generator=generator, dtype=torch.float64)
    call = small(form, query=query, mask=mask)
    output = prefix_attention(*call)
    changed = call.value.detach().clone()
    changed[:, :, 2:] += 1
    other = prefix_attention(*call._replace(value=changed))
    assert torch.equal(output[:, :, :2], other[:, :, :2])
    assert (output[:, :, 2:] - other[:, :, 2:]).abs().min() > 1e-3
    first = call.prefixes[0][0]
    (gradient,) = torch.autograd.grad(output[:, :, 0].sin().sum(), first)
    assert (gradient.abs().sum(-1) > 0).all()  # each row (C, P), even for the first query


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_without_prefix_gets_attention_as_it_was_to_the_last_bit(form):
    call = small(form)
    plain = prefix_attention(call.query, call.key, call.value, [], None, None, 0.7)
    output = prefix_attention(*call)
    assert torch.equal(output[2], plain[2])
    assert (output[:2] - plain[:2]).abs().min() > 0


@pytest.mark.parametrize("form", FORMS)
def test_a_query_that_sees_no_key_gets_its_prefix_alone(form):
    mask = torch.ones(3, 1, 2, 4, dtype=torch.bool)
    mask[0] = False
    call = small(form, mask=mask)
    output = prefix_attention(*call)
    prefix = call.prefixes[0]
    made = prefix.materialised() if isinstance(prefix, SiteRows) else prefix
    keys, values = (part[1].view(3, 2, 2).transpose(0, 1) for part in made[:2])
    alone = (0.7 * call.query[0] @ keys.mT).softmax(-1) @ values
    assert torch.allclose(output[0], alone, atol=1e-12)
    assert all(g.isfinite().all() for g in torch.autograd.grad(output.sum(), call.inputs()))


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_does_not_depend_on_the_others_beyond_rounding(form):
    whole = small(form)
    together = prefix_attention(*whole)
    for row in range(3):
        one = whole.prefixes[0]._replace(rows=whole.prefixes[0].rows[row : row + 1])
        alone = prefix_attention(*(part[row : row + 1] for part in whole[:3]), [one], None, None, 0.7)
        assert torch.allclose(alone[0], together[row], rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_stays_near(form, dtype):
    call = small(form)

    def half(part: Any) -> Any:
        return part.detach().to(dtype) if isinstance(part, Tensor) and part.is_floating_point() else part

    expected = prefix_attention(*call)
    lower = [type(prefix)(*map(half, prefix)) for prefix in call.prefixes]
    actual = prefix_attention(*map(half, call[:3]), lower, None, None, 0.7)
    assert actual.dtype == dtype
    assert (actual - expected).norm() < 0.02 * expected.norm()  # bf16 keeps 8 bits


@pytest.mark.parametrize("form", FORMS)
def test_under_autocast_it_computes_in_the_lower_type_like_torchs_own_attention(form):
    call = small(form)
    single = [part.detach().float() for part in call[:3]]
    lower = [type(p)(*(t.float() if isinstance(t, Tensor) and t.ndim != 1 else t for t in p)) for p in call.prefixes]
    lower = [p._replace(bias=p.bias.float()) if isinstance(p, SiteRows) else p for p in lower]
    with torch.autocast("cpu", torch.bfloat16):
        output = prefix_attention(*single, lower, None, None, 0.7)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_dropout_keeps_the_mean_and_is_drawn_over_prefix_and_keys_alike(form):
    torch.manual_seed(0)
    call = small(form)
    expected = prefix_attention(*call)
    drawn = torch.stack([prefix_attention(*call, dropout=0.3).detach() for _ in range(3000)])
    assert not torch.equal(drawn[0], drawn[1])
    assert (drawn.mean(0) - expected).abs().max() < 6 * drawn.std(0).max() / 3000**0.5


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_that_is_trained_gets_its_gradient(form):
    bias = torch.randn(1, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    call = small(form, bias=bias)
    gradients = [torch.autograd.grad(f(*call).sin().sum(), bias)[0] for f in (prefix_attention, reference)]
    assert torch.allclose(*gradients, atol=1e-12)


def test_absorbed_rows_never_become_keys_and_values():
    """At most scores and rows are held for the backward pass: nothing of a condition's size that is a head wide."""
    generator = torch.Generator().manual_seed(0)
    samples, columns, hyper, heads, size = 3, 40, 4, 4, 8
    query, key, value = (torch.randn(samples, heads, 2, size, generator=generator).requires_grad_() for _ in range(3))
    maps = ((samples, columns, hyper), (2 * heads * size, hyper), (2 * heads * size,))
    prefix = SiteRows(*(torch.randn(shape, generator=generator) for shape in maps), torch.arange(samples))
    prefix = prefix._replace(hyper=prefix.hyper.requires_grad_(), weight=prefix.weight.requires_grad_())
    largest = {}
    for dropout in (0.0, 0.1):  # both ways that absorb
        for name, part in (("absorbed", prefix), ("materialised", prefix.materialised())):
            held: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, held=held: held.append(t.numel()) or t, lambda t: t
            ):
                prefix_attention(query, key, value, [part], None, None, 1.0, dropout)
            largest[name, dropout] = max(held)
    for dropout in (0.0, 0.1):
        assert largest["absorbed", dropout] < samples * columns * heads * size <= largest["materialised", dropout]


def test_conditions_in_order_are_not_copied_and_others_are_once():
    assert spread_of(torch.tensor([0, 0, 1, 1]), 2) == Spread(None, None)
    assert spread_of(torch.zeros(3, dtype=torch.long), 1) == Spread(None, None)
    for rows in ([1, 0], [0, 0, 1], [0, 1, 1, 1]):
        assert spread_of(torch.tensor(rows), 2).condition.tolist() == rows
    condition, missing = spread_of(torch.tensor([-1, 0]), 1)
    assert (condition.tolist(), missing.tolist()) == ([0, 0], [True, False])
    prefix = SitePrefix(torch.ones(2, 1, 4), torch.ones(2, 1, 4), torch.tensor([0, 0, 1, 1]))
    assert spread(prefix).keys is prefix.keys
    once = spread(prefix._replace(rows=torch.tensor([1, 0, 1, 1])))
    assert once.keys.shape == (4, 1, 4) and spread(once).keys is once.keys


@pytest.mark.parametrize("low, high", [(-2, 1), (0, 2)])
def test_a_row_that_is_no_condition_is_refused(low, high):
    with pytest.raises(KernelShapeError, match=rf"rows: allowed are -1 to 1, got {low} to {high}"):
        spread_of(torch.tensor([low, 0, high]), 2)


@pytest.mark.parametrize(
    "form, change, message",
    [
        ("materialised", dict(key=torch.ones(3, 2, 4, 3)), r"key: expected shape \(3, 2, 4, 2\), got \(3, 2, 4, 3\)"),
        (
            "materialised",
            dict(query=torch.ones(3, 2, 4)),
            r"query: expected \(B, heads, tokens, size\), got \(3, 2, 4\)",
        ),
        ("materialised", dict(value=torch.ones(3, 2, 5, 2)), r"value: expected shape \(3, 2, 4, 2\)"),
        ("materialised", dict(mask=torch.ones(3, 1, 4, 4).bool()), r"mask: expected shape \(3 or 1, 1, 2, 4\)"),
        ("materialised", dict(bias=torch.ones(1, 3, 2, 4)), r"bias: expected shape \(3 or 1, 1 or 2, 2, 4\)"),
        ("materialised", dict(keys=torch.ones(2, 3, 5)), r"prefixes\[0\].keys: expected shape \(2, 3, 4\)"),
        ("materialised", dict(values=torch.ones(2, 2, 4)), r"prefixes\[0\].values: expected shape \(2, 3, 4\)"),
        ("absorbed", dict(weight=torch.ones(8, 3)), r"prefixes\[0\].weight: expected shape \(8, 2\), got \(8, 3\)"),
        ("absorbed", dict(bias=torch.ones(4)), r"bias: expected shape"),
        ("absorbed", dict(rows=torch.zeros(2).long()), r"prefixes\[0\].rows: expected shape \(3,\), got \(2,\)"),
    ],
)
def test_what_does_not_fit_is_named(form, change, message):
    call = small(form)
    own = {name: part for name, part in change.items() if name in call.prefixes[0]._fields}
    rest = {name: part for name, part in change.items() if name not in own}
    call = call._replace(prefixes=[call.prefixes[0]._replace(**own)], **rest)
    with pytest.raises(KernelShapeError, match=message):
        prefix_attention(*call)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(value=torch.ones(3, 2, 4, 2, dtype=torch.float16)), r"value: expected torch.float64, got torch.float16"),
        (dict(mask=torch.ones(3, 1, 2, 4)), r"mask: expected torch.bool, got torch.float32"),
        (
            dict(key=torch.ones(3, 2, 4, 2, device="meta")),
            r"key: expected a tensor on cpu as query is, got one on meta",
        ),
        (dict(keys=torch.ones(2, 3, 4, device="meta")), r"prefixes\[0\].keys: expected a tensor on cpu"),
    ],
)
def test_types_and_devices_that_do_not_fit_are_named(change, message):
    call = small("materialised")
    own = {name: part for name, part in change.items() if name in call.prefixes[0]._fields}
    rest = {name: part for name, part in change.items() if name not in own}
    with pytest.raises(KernelDtypeError, match=message):
        prefix_attention(*call._replace(prefixes=[call.prefixes[0]._replace(**own)], **rest))


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("heads_of_bias", [1, 6])
def test_heads_that_share_a_key_are_attended_to_as_torch_does(queries, heads_of_bias):
    """What is added would send torch, before 2.14, to a kernel that holds all scores; so keys or queries are moved."""
    torch.manual_seed(0)
    query, bias = torch.randn(2, 6, queries, 4), torch.randn(2, heads_of_bias, queries, 5)
    key, value = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    for added in (bias, bias[:1], None):
        expected = F.scaled_dot_product_attention(query, key, value, added, scale=0.7, enable_gqa=True)
        assert torch.allclose(attention(query, key, value, added, 0.0, 0.7), expected, atol=1e-6)


def test_the_share_of_prefixes_is_the_same_some_queries_at_a_time(monkeypatch):
    torch.manual_seed(0)
    query, key, rows = torch.randn(3, 4, 7, 2), torch.randn(3, 2, 5, 2), torch.tensor([1, -1, 0])
    prefixes, bias = [SitePrefix(torch.randn(2, 3, 4), torch.randn(2, 3, 4), rows)], torch.randn(3, 1, 7, 5)
    at_once = prefix_share(query, key, prefixes, bias, 0.5)
    monkeypatch.setattr(share, "_SCORES", 3 * 4 * 5 * 2)  # two queries at a time
    assert torch.allclose(prefix_share(query, key, prefixes, bias, 0.5), at_once, atol=1e-6)
    assert torch.allclose(prefix_share(query, key, prefixes, None, 0.5)[1], torch.zeros(7))
