"""Prefix attention merged from torch's CUDA kernels, and padding left out, on a GPU. Not run yet anywhere by us: no GPU
was at hand when they were written. What is held here on a GPU is held against a stand-in in test_kernels_prefix.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_cases import error
from tiny import tiny_batch, tiny_hypernet, tiny_model, tiny_modules
from torch import Tensor

from hyperpelt_ds.backbones import Backbone
from hyperpelt_ds.kernels.prefix_attention import (
    CUDA,
    MERGED,
    SitePrefix,
    SiteRows,
    concatenated,
    explicit,
    merged,
    prefix_attention,
    reference,
    score_bias,
)

pytestmark = pytest.mark.gpu
FORMS = ("materialised", "absorbed")


def _call(form: str, dtype: torch.dtype, samples: int = 6, queries: int = 33, keys: int = 45, size: int = 64) -> Any:
    """Ragged keys, a bias of odd width, conditions out of order, and a last sample that has no prefix."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to("cuda", dtype).requires_grad_()

    heads, rows = 3, torch.tensor([1, 0, 1, 0, 2, -1] * samples)[:samples].cuda()
    query = draw(samples, queries, heads, size).transpose(1, 2)
    key, value = (draw(samples, keys, heads, size).transpose(1, 2) for _ in range(2))
    width = heads * size
    prefix: Any = (
        SitePrefix(draw(3, 17, width), draw(3, 17, width), rows, draw())
        if form == "materialised"
        else SiteRows(draw(3, 17, 32), draw(2 * width, 32, std=0.2), draw(2 * width), rows, draw())
    )
    mask = (torch.arange(keys) < torch.arange(3, 3 + samples).view(-1, 1, 1, 1)).expand(-1, 1, queries, -1).cuda()
    bias = draw(1, heads, queries, keys).detach()
    return query, key, value, prefix, mask, bias, size**-0.5


def _inputs(call: Any) -> list[Tensor]:
    return [part for part in (*call[:3], *call[3]) if isinstance(part, Tensor) and part.requires_grad]


def _outcome(call: Any, way: str = "merged") -> list[Tensor]:
    """The output and every gradient, for one fixed gradient of the output."""
    query, key, value, prefix, mask, bias, scale = call
    added = score_bias(mask, bias, query.dtype)
    if way == "merged":
        output = merged(CUDA, query, key, value, [prefix], added, scale)
    elif way == "formula":
        output = reference(query, key, value, [prefix], mask, bias, scale)
    elif isinstance(prefix, SitePrefix):
        output = concatenated(query, key, value, [prefix], added, scale, 0.0)
    else:
        output = explicit(query, key, value, [prefix], added, scale, 0.0)
    given = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad(output, _inputs(call), given)]


def _double(call: Any) -> Any:
    def wide(part: Any) -> Any:
        if not (isinstance(part, Tensor) and part.is_floating_point()):
            return part
        return part.detach().double().requires_grad_(part.requires_grad)

    return (*map(wide, call[:3]), type(call[3])(*map(wide, call[3])), call[4], wide(call[5]), call[6])


@pytest.mark.parametrize("dtype", CUDA.dtypes, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_error_is_at_most_twice_that_of_the_way_it_would_replace(form, dtype):
    """Twice: besides the joint output, each part's own is rounded, and so are their gradients of the queries (on a CPU
    1.4 and 1.6 times). The offset's gradient is one sum of all scores' gradients, which nearly cancel."""
    call, epsilon = _call(form, dtype), torch.finfo(dtype).eps
    expected = _outcome(_double(call), "formula")
    for n, (ours, theirs, wanted) in enumerate(zip(_outcome(call), _outcome(call, "other"), expected, strict=True)):
        limit = 16 * epsilon if wanted.numel() == 1 else 2 * error(theirs, wanted) + 2e-6
        assert error(ours, wanted) <= limit, n


@pytest.mark.parametrize("form", FORMS)
def test_a_query_that_sees_no_key_gets_its_prefix_alone(form):
    query, key, value, prefix, mask, bias, scale = _call(form, torch.bfloat16)
    mask = mask.clone()
    mask[0] = False
    output, *gradients = _outcome((query, key, value, prefix, mask, bias, scale))
    made = prefix.materialised() if isinstance(prefix, SiteRows) else prefix
    keys, values = (part[1].unflatten(-1, (3, 64)).transpose(0, 1).float() for part in made[:2])
    alone = (scale * query[0].float() @ keys.mT).softmax(-1) @ values
    assert error(output[0], alone) < 2e-2
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("keys", [45, 300])  # more than one block of keys
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients_repeat_to_the_last_bit(form, keys):
    call = _call(form, torch.bfloat16, keys=keys)
    first = _outcome(call)
    for _ in range(3):
        assert all(torch.equal(one, two) for one, two in zip(first, _outcome(call), strict=True))


def test_a_samples_output_does_not_depend_on_the_others():
    query, key, value, prefix, mask, bias, scale = _call("materialised", torch.bfloat16)
    together = _outcome((query, key, value, prefix, mask, bias, scale))[0]
    for n in range(len(query)):
        one = prefix._replace(rows=prefix.rows[n : n + 1])
        alone = merged(
            CUDA, query[n : n + 1], key[n : n + 1], value[n : n + 1], [one],
            score_bias(mask[n : n + 1], bias, torch.bfloat16), scale,
        )  # fmt: skip
        assert torch.equal(alone[0], together[n])


def test_no_key_and_no_value_is_copied():
    """A few queries on many keys: what is allocated on the way stays far below the keys."""
    query, key, value, prefix, mask, bias, scale = _call("materialised", torch.bfloat16, queries=8, keys=4096)
    added = score_bias(mask, bias, torch.bfloat16)
    most = {}
    for name in ("merged", "copied"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if name == "merged":
            output = merged(CUDA, query, key, value, [prefix], added, scale)
        else:
            output = concatenated(query, key, value, [prefix], added, scale, 0.0)
        most[name] = torch.cuda.max_memory_allocated() - before
        del output
    assert most["merged"] < key.nbytes / 2 < 2 * key.nbytes < most["copied"]


def test_nothing_waits_for_the_gpu_and_the_model_takes_it_when_told(monkeypatch):
    monkeypatch.setitem(MERGED, "cuda", CUDA)
    query, key, value, prefix, mask, bias, scale = _call("absorbed", torch.bfloat16)
    expected = _outcome((query, key, value, prefix, mask, bias, scale))[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = prefix_attention(query, key, value, [prefix], mask, bias, scale)
        output.float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(output, expected)


@pytest.mark.parametrize("kind", ["t5", "bart", "llama"])
def test_padding_is_left_out_and_the_loss_and_its_gradients_stay(kind):
    outcomes = []
    for skips in (None, False):  # as on a GPU, and not
        backbone = Backbone(tiny_model(kind), None, tiny_modules(bottleneck=8)).to(torch.device("cuda"))
        backbone.skips_padding = skips
        network, batch = tiny_hypernet(backbone).cuda(), tiny_batch(backbone.model).to("cuda")
        logits = backbone.forward(network(batch), batch.input_ids, batch.attention_mask, batch.labels, batch.targets)
        logits.logsumexp(-1).sum().backward()
        assert (backbone.slot.ends is None) == (skips is False)
        outcomes.append([logits, *(parameter.grad for parameter in network.parameters() if parameter.grad is not None)])
    for one, two in zip(*outcomes, strict=True):
        assert error(one, two) < 1e-4
