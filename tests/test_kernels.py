"""The products on generated weights against their formulas, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperpelt_ds.kernels import adapter, generate, prefix_attention
from hyperpelt_ds.kernels.adapter import SiteAdapter
from hyperpelt_ds.kernels.prefix_attention import SitePrefix

shapes = st.tuples(*(st.integers(1, n) for n in (4, 5, 6, 3, 3)))  # samples, tokens, model size, bottleneck, conditions


def _adapter(generator, conditions, size, bottleneck, batch) -> SiteAdapter:
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    rows = torch.randint(-1, conditions, (batch,), generator=generator)
    rows[0] = 0  # someone uses it, so that it has a gradient
    return SiteAdapter(
        draw(conditions, size, bottleneck),
        draw(conditions, bottleneck),
        draw(conditions, bottleneck, size),
        draw(conditions, size),
        draw(()),
        rows,
    )


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from(["relu", "gelu", "silu"]), st.integers(0, 2**31))
def test_adapters_of_two_branches_equal_the_formula_for_each_sample(shape, activation, seed):
    batch, length, size, bottleneck, conditions = shape
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(batch, length, size, generator=generator, dtype=torch.float64) for _ in range(2))
    parts = [_adapter(generator, conditions, size, bottleneck, batch) for _ in range(2)]
    act = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}[activation]
    expected = residual.clone()
    for part in parts:
        for i, row in enumerate(part.rows.tolist()):
            if row >= 0:
                hidden = act(x[i] @ part.down[row] + part.down_bias[row])
                expected[i] = expected[i] + part.scale * (hidden @ part.up[row] + part.up_bias[row])
    actual = adapter(x, residual, parts, activation)
    assert torch.allclose(actual, expected, atol=1e-10)
    gradients = [torch.autograd.grad(y.sin().sum(), parts[0][:5], retain_graph=True) for y in (actual, expected)]
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, atol=1e-9)


def test_two_parallel_adapters_equal_one_with_their_bottlenecks_side_by_side():
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(3, 4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    one, two = (_adapter(generator, 2, 6, 3, 3)._replace(rows=torch.tensor([0, 1, 1])) for _ in range(2))
    unit = torch.ones((), dtype=torch.float64)
    one, two = one._replace(scale=unit), two._replace(scale=unit)
    joined = SiteAdapter(
        torch.cat([one.down, two.down], 2),
        torch.cat([one.down_bias, two.down_bias], 1),
        torch.cat([one.up, two.up], 1),
        one.up_bias + two.up_bias,
        unit,
        one.rows,
    )
    assert torch.allclose(adapter(x, residual, [one, two], "relu"), adapter(x, residual, [joined], "relu"))


@settings(max_examples=40, deadline=None)
@given(shapes, st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_prefix_attention_equals_softmax_over_prefix_and_keys(shape, masked, biased, seed):
    batch, length, keys_length, size, conditions = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*dims):
        return torch.randn(*dims, generator=generator, dtype=torch.float64)

    heads = 2
    query, key, value = draw(batch, heads, length, size), *(draw(batch, heads, keys_length, size) for _ in range(2))
    prefixes = [
        SitePrefix(
            draw(conditions, rows, heads * size),
            draw(conditions, rows, heads * size),
            torch.randint(-1, conditions, (batch,), generator=generator),
        )
        for rows in (2, 3)
    ]
    mask = torch.rand(batch, 1, length, keys_length, generator=generator) < 0.7
    mask[..., 0] = True  # every query sees something
    bias = draw(1, heads, length, keys_length)
    actual = prefix_attention(query, key, value, prefixes, mask if masked else None, bias if biased else None, 0.5)
    for i in range(batch):
        for h in range(heads):
            columns = slice(h * size, (h + 1) * size)
            used = [
                (p.keys[p.rows[i], :, columns], p.values[p.rows[i], :, columns]) for p in prefixes if p.rows[i] >= 0
            ]
            scores = 0.5 * query[i, h] @ key[i, h].T + (bias[0, h] if biased else 0)
            if masked:
                scores = scores.masked_fill(~mask[i, 0], -torch.inf)
            scores = torch.cat([0.5 * query[i, h] @ k.T for k, _ in used] + [scores], 1)
            values = torch.cat([v for _, v in used] + [value[i, h]])
            assert torch.allclose(actual[i, h], scores.softmax(1) @ values, atol=1e-10)


def test_a_zero_prefix_still_takes_softmax_mass():
    query = key = value = torch.ones(1, 1, 2, 4)
    prefix = SitePrefix(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.tensor([0]))
    with_prefix = prefix_attention(query, key, value, [prefix], None, None, 1.0)
    assert with_prefix.max() < 0.999
    assert torch.allclose(prefix_attention(query, key, value, [], None, None, 1.0), value)


def test_prefix_attention_has_correct_gradients():
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 2, 3, 2),) * 3]
    prefix = [torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def attend(query, key, value, keys, values):
        return prefix_attention(query, key, value, [SitePrefix(keys, values, torch.tensor([1, -1]))], None, None, 0.7)

    assert torch.autograd.gradcheck(attend, (*inputs, *prefix))


def test_generate_is_one_linear_map_for_all_sites_and_conditions():
    hyper, weight, bias = torch.randn(3, 2, 5, 4), torch.randn(7, 4), torch.randn(7)
    out = generate(hyper, weight, bias)
    assert out.shape == (3, 2, 5, 7)
    assert torch.allclose(out[2, 1, 3], weight @ hyper[2, 1, 3] + bias, atol=1e-6)


def test_an_unknown_activation_is_refused():
    with pytest.raises(KeyError):
        adapter(torch.ones(1, 1, 1), torch.ones(1, 1, 1), [], "tanh")
