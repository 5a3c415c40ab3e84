"""The products on generated weights against their formulas, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperpelt_ds.kernels import adapter, generate, index_batch, low_rank, prefix_attention
from hyperpelt_ds.kernels.adapter import SiteAdapter
from hyperpelt_ds.kernels.low_rank import SiteLowRank
from hyperpelt_ds.kernels.prefix_attention import SitePrefix

shapes = st.tuples(*(st.integers(1, n) for n in (4, 5, 6, 3, 3)))  # samples, tokens, model size, bottleneck, conditions


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_new": gelu_new,
    "silu": torch.nn.functional.silu,
}


def _adapter(generator, conditions, size, bottleneck, batch, norm=False) -> SiteAdapter:
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
        index_batch(rows, groups=conditions),
        *((draw(conditions, size), draw(conditions, size)) if norm else ()),
    )


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from(list(ACTIVATIONS)), st.booleans(), st.integers(0, 2**31))
def test_adapters_of_two_branches_equal_the_formula_for_each_sample(shape, activation, norm, seed):
    batch, length, size, bottleneck, conditions = shape
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(batch, length, size, generator=generator, dtype=torch.float64) for _ in range(2))
    parts = [_adapter(generator, conditions, size, bottleneck, batch, norm and i == 1) for i in range(2)]
    act = ACTIVATIONS[activation]
    expected = residual.clone()
    for part in parts:
        for i, row in enumerate(part.users.ids.tolist()):
            if row >= 0:
                hidden = act(x[i] @ part.down[row] + part.down_bias[row])
                added = hidden @ part.up[row] + part.up_bias[row]
                if part.gain is not None:
                    centred = added - added.mean(-1, keepdim=True)
                    added = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
                    added = added * part.gain[row] + part.shift[row]
                expected[i] = expected[i] + part.scale * added
    actual = adapter(x, residual, parts, activation)
    assert torch.allclose(actual, expected, atol=1e-10)
    inputs = [tensor for part in parts for tensor in (*part[:5], *part[6:]) if tensor is not None]
    gradients = [torch.autograd.grad(y.sin().sum(), inputs, retain_graph=True) for y in (actual, expected)]
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, rtol=1e-6, atol=1e-7)  # a norm over few numbers has steep gradients


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(1, 5), st.integers(0, 2**31))
def test_low_rank_deltas_of_two_branches_equal_changed_matrices(shape, outputs, seed):
    batch, length, inputs, rank, conditions = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*dims):
        return torch.randn(*dims, generator=generator, dtype=torch.float64).requires_grad_()

    x, matrix = draw(batch, length, inputs), draw(inputs, outputs)
    deltas = [
        SiteLowRank(
            draw(conditions, inputs, rank),
            draw(conditions, rank, outputs),
            index_batch(torch.randint(-1, conditions, (batch,), generator=generator), groups=conditions),
        )
        for _ in range(2)
    ]
    changed = [
        matrix + sum(d.down[row] @ d.up[row] for d in deltas if (row := int(d.users.ids[i])) >= 0) for i in range(batch)
    ]
    expected = torch.stack([x[i] @ changed[i] for i in range(batch)])
    actual = low_rank(x, x @ matrix, deltas)
    assert torch.allclose(actual, expected, atol=1e-10)
    needed = [x, matrix, *(tensor for delta in deltas for tensor in delta[:2])]
    gradients = [
        torch.autograd.grad(y.sin().sum(), needed, retain_graph=True, allow_unused=True, materialize_grads=True)
        for y in (actual, expected)
    ]
    assert all(torch.allclose(one, two, atol=1e-9) for one, two in zip(*gradients, strict=True))


def test_two_parallel_adapters_equal_one_with_their_bottlenecks_side_by_side():
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(3, 4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    one, two = (_adapter(generator, 2, 6, 3, 3)._replace(users=index_batch([0, 1, 1])) for _ in range(2))
    unit = torch.ones((), dtype=torch.float64)
    one, two = one._replace(scale=unit), two._replace(scale=unit)
    joined = SiteAdapter(
        torch.cat([one.down, two.down], 2),
        torch.cat([one.down_bias, two.down_bias], 1),
        torch.cat([one.up, two.up], 1),
        one.up_bias + two.up_bias,
        unit,
        one.users,
    )
    assert torch.allclose(adapter(x, residual, [one, two], "relu"), adapter(x, residual, [joined], "relu"))


@settings(max_examples=60, deadline=None)
@given(shapes, st.booleans(), st.booleans(), st.booleans(), st.sampled_from([1, 2]), st.integers(0, 2**31))
def test_prefix_attention_equals_softmax_over_prefix_and_keys(shape, masked, biased, offset, group, seed):
    batch, length, keys_length, size, conditions = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*dims):
        return torch.randn(*dims, generator=generator, dtype=torch.float64)

    key_heads = 2
    heads = group * key_heads  # `group` queries share a key
    query = draw(batch, heads, length, size)
    key, value = (draw(batch, key_heads, keys_length, size) for _ in range(2))
    prefixes = [
        SitePrefix(
            draw(conditions, rows, key_heads * size),
            draw(conditions, rows, key_heads * size),
            torch.randint(-1, conditions, (batch,), generator=generator),
            draw(()) if offset and rows == 3 else None,  # one branch with and one without
        )
        for rows in (2, 3)
    ]
    mask = torch.rand(batch, 1, length, keys_length, generator=generator) < 0.7
    mask[..., 0] = True  # every query sees something
    bias = draw(1, heads, length, keys_length)
    actual = prefix_attention(query, key, value, prefixes, mask if masked else None, bias if biased else None, 0.5)
    for i in range(batch):
        for h in range(heads):
            columns = slice(h // group * size, (h // group + 1) * size)
            used = [p for p in prefixes if p.rows[i] >= 0]
            scores = 0.5 * query[i, h] @ key[i, h // group].T + (bias[0, h] if biased else 0)
            if masked:
                scores = scores.masked_fill(~mask[i, 0], -torch.inf)
            before = [
                0.5 * query[i, h] @ p.keys[p.rows[i], :, columns].T + (0 if p.offset is None else p.offset)
                for p in used
            ]
            values = torch.cat([*(p.values[p.rows[i], :, columns] for p in used), value[i, h // group]])
            expected = torch.cat([*before, scores], 1).softmax(1) @ values
            assert torch.allclose(actual[i, h], expected, atol=1e-10)


def test_without_prefixes_grouped_queries_share_keys():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 3, 5), torch.randn(2, 2, 6, 5), torch.randn(2, 2, 6, 5)
    expected = torch.stack(
        [(query[:, h] @ key[:, h // 2].mT * 0.3).softmax(-1) @ value[:, h // 2] for h in range(4)], dim=1
    )
    assert torch.allclose(prefix_attention(query, key, value, [], None, None, 0.3), expected, atol=1e-6)


def test_a_zero_prefix_still_takes_softmax_mass():
    query = key = value = torch.ones(1, 1, 2, 4)
    prefix = SitePrefix(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.tensor([0]))
    with_prefix = prefix_attention(query, key, value, [prefix], None, None, 1.0)
    assert with_prefix.max() < 0.999
    assert torch.allclose(prefix_attention(query, key, value, [], None, None, 1.0), value)


def test_prefix_attention_has_correct_gradients():
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 2, 3, 2),) * 3]
    prefix = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 2, 4), (2, 2, 4), ())]

    def attend(query, key, value, keys, values, offset):
        prefixes = [SitePrefix(keys, values, torch.tensor([1, -1]), offset)]
        return prefix_attention(query, key, value, prefixes, None, None, 0.7)

    assert torch.autograd.gradcheck(attend, (*inputs, *prefix))


def test_generate_is_one_linear_map_for_all_sites_and_conditions():
    hyper, weight, bias = torch.randn(3, 2, 5, 4), torch.randn(7, 4), torch.randn(7)
    out = generate(hyper, weight, bias)
    assert out.shape == (3, 2, 5, 7)
    assert torch.allclose(out[2, 1, 3], weight @ hyper[2, 1, 3] + bias, atol=1e-6)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation"):
        adapter(torch.ones(1, 1, 1), torch.ones(1, 1, 1), [], "tanh")
