"""A whole model answers and learns alike whichever form its prefixes take, and takes the one that costs less."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny import KINDS, tiny_batch, tiny_hypernet, tiny_model, tiny_modules
from torch import Tensor

from hyperpelt_ds.backbones import Backbone
from hyperpelt_ds.backbones import slot as slots
from hyperpelt_ds.backbones.prefix_form import by_site
from hyperpelt_ds.backbones.slot import Slot
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Batch, Branch, Prefix, PrefixRows
from hyperpelt_ds.hypernet import HyperNetwork
from hyperpelt_ds.kernels.prefix_attention import MERGED, SitePrefix, SiteRows, Spread, prefix_attention
from hyperpelt_ds.model import HyperPELT

FORMS = ("materialised", "absorbed", "auto")


def parts(
    kind: str, form: str, checkpointing: bool = False, hypernet: dict[str, Any] | None = None, **modules: Any
) -> tuple[Backbone, HyperNetwork, Batch]:
    """A tiny model in float64 with prefixes alone, and a batch."""
    model = tiny_model(kind).double()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    backbone = Backbone(model, None, tiny_modules(kinds=("prefix",), **modules), prefix_form=form)
    network = tiny_hypernet(backbone, **(hypernet or {})).double()
    batch = tiny_batch(model)
    return backbone, network, batch._replace(images=batch.images.double())


def outcome(kind: str, form: str, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of every parameter."""
    backbone, network, batch = parts(kind, form, **settings)
    backbone.train("checkpointing" in settings)
    weights = network(batch, prefix_rows=form != "materialised")
    logits = backbone.forward(weights, batch.input_ids, batch.attention_mask, batch.labels, batch.targets)
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in network.named_parameters()}


def alike(one: tuple[Tensor, dict[str, Tensor]], two: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.allclose(one[0], two[0], rtol=0, atol=1e-9)
    for name, gradient in one[1].items():
        assert gradient.abs().sum() > 0, name
        assert (gradient - two[1][name]).norm() < 1e-10 * max(1.0, gradient.norm()), name


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_every_gradient_are_the_same_in_every_form(kind, form):
    alike(outcome(kind, "materialised"), outcome(kind, form))


@pytest.mark.parametrize("kind", ["t5", "bart", "llama"])
@pytest.mark.parametrize("weighting", ["offset", "gate"])
def test_so_they_are_with_weighted_columns_and_a_hypernetwork_for_each_stack(kind, weighting):
    settings: dict[str, Any] = dict(prefix_weighting=weighting, hypernet={"copies": 2})
    expected = outcome(kind, "materialised", **settings)
    alike(expected, outcome(kind, "absorbed", **settings))
    alike(expected, outcome(kind, "auto", **settings))


@pytest.mark.parametrize("kind", ["t5", "bart", "llama"])
def test_activation_checkpointing_changes_no_gradient_in_the_absorbed_form(kind):
    alike(outcome(kind, "materialised"), outcome(kind, "absorbed", checkpointing=True))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_generated_answers_are_the_same_in_every_form(kind, beams):
    answers = []
    for form in FORMS:
        backbone, network, batch = parts(kind, form)
        with torch.no_grad():
            weights = network(batch, prefix_rows=form != "materialised")
        answers.append(backbone.generate(weights, batch.input_ids, batch.attention_mask, 6, beams))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def test_rows_with_their_map_materialise_to_what_the_head_makes():
    for copies in (1, 2):
        _, network, batch = parts("t5", "auto", hypernet={"copies": copies})
        for made, rows in zip(network(batch).branches, network(batch, prefix_rows=True).branches, strict=True):
            assert isinstance(made.prefix, Prefix) and isinstance(rows.prefix, PrefixRows)
            again = rows.prefix.materialised()
            for one, two in zip(made.prefix[:2], again[:2], strict=True):
                assert torch.allclose(one, two, atol=1e-12)
            assert torch.equal(made.rows, rows.rows)


def test_auto_absorbs_where_a_batch_has_fewer_queries_than_its_conditions_have_rows(monkeypatch):
    rows = PrefixRows(torch.randn(3, 4, 5, 6), torch.randn(1, 16, 6), torch.randn(1, 16))  # 4 conditions of 5 rows
    samples = torch.arange(4)

    def kinds(lengths: list[int], form: str = "auto") -> list[type]:
        return [type(prefix) for prefix in by_site(rows, samples, lengths, form)]

    assert kinds([3, 4, 1]) == [SiteRows, SitePrefix, SiteRows]
    assert kinds([5, 5, 5]) == [SitePrefix] * 3
    assert kinds([3, 4, 1], "materialised") == [SitePrefix] * 3
    assert kinds([3, 4, 1], "absorbed") == [SiteRows] * 3
    mixed, made = by_site(rows, samples, [3, 4, 1], "auto"), rows.materialised()
    assert torch.allclose(mixed[1].keys, made.keys[1]) and torch.allclose(mixed[1].values, made.values[1])
    monkeypatch.delitem(MERGED, "cpu")  # as on a device where parts are not merged
    assert kinds([3, 4, 1]) == [SitePrefix] * 3 and kinds([3, 4, 1], "absorbed") == [SiteRows] * 3


@pytest.mark.parametrize("on_device", [False, True])
def test_in_generation_keys_that_come_again_are_joined_with_their_prefix_once(monkeypatch, on_device):
    if on_device:  # where the rows are not looked at when weights are set
        monkeypatch.setattr(slots, "spread_of", lambda rows, conditions: Spread(rows.clamp(min=0), rows < 0))
    prefix = Prefix(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))
    rows = PrefixRows(torch.randn(1, 2, 4, 5), torch.randn(1, 16, 5), torch.randn(1, 16))
    some = torch.tensor([1, -1])
    slot = Slot()
    branches = [Branch(torch.tensor([1, 0]), prefix, None), Branch(some, prefix, None), Branch(some, rows, None)]
    slot.set(tuple(branches), None, [1], "absorbed")
    with torch.no_grad():
        prefixes = slot.prefixes(0, 2, 1)
        assert slot.prefixes(0, 2, 1) is prefixes
        key, value = torch.randn(2, 2, 6, 4), torch.randn(2, 2, 6, 4)
        assert slot.joined(0, key, value, prefixes) == (key, value, 0, prefixes)
        longer, values, columns, rest = slot.joined(0, key, value, prefixes)
        assert (longer.shape, values.shape, columns) == ((2, 2, 9, 4), (2, 2, 9, 4), 3)
        assert rest == prefixes[1:]  # one has samples without it, the other no keys
        expected = prefix_attention(key, key, value, prefixes, None, None, 0.5)
        bias = torch.zeros(1, 1, 6, 9)
        assert torch.allclose(prefix_attention(key, longer, values, rest, None, bias, 0.5), expected, atol=1e-6)
        assert slot.joined(0, key, value, prefixes)[0] is longer
        assert slot.joined(0, key.clone(), value, prefixes)[2] == 0  # beams that changed places
        slot.joined(0, key, value, rest)
        assert slot.joined(0, key, value, rest)[0] is key, "nothing to join is nothing to copy"


@pytest.mark.parametrize("form", FORMS)
def test_a_run_is_told_its_form_and_learns_from_batches_without_images_too(form):
    config = Config().override(
        ["modules.prefix_length=3", "modules.bottleneck=4", "vision.encoder=resnet18", "vision.cells=5",
         "vision.channels=7", f"model.prefix_form={form}"]
    )  # fmt: skip
    backbone = Backbone(tiny_model("t5"), None, config.modules, prefix_form=config.model.prefix_form)
    model = HyperPELT(config, backbone, ["a", "b", "c"])
    batch = tiny_batch(backbone.model)
    for samples in (
        batch.samples,
        tuple(sample.__class__(str(i), "a", "", "") for i, sample in enumerate(batch.samples)),
    ):
        model.zero_grad()
        model(batch._replace(samples=samples)).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
def test_two_ranks_learn_the_same_from_absorbed_prefixes_whose_map_zero_3_takes_away(train_many, config, tmp_path):
    jobs = {
        name: (config.override([f"model.prefix_form={form}"]), f"ds_configs/zero{stage}_cpu.json", tmp_path / name)
        for name, form, stage in (("made", "materialised", 2), ("two", "absorbed", 2), ("three", "absorbed", 3))
    }
    train_many(jobs)
    losses = {}
    for name in jobs:
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses["made"]) > 5
    assert losses["two"] == pytest.approx(losses["made"], rel=1e-5)
    assert losses["three"] == pytest.approx(losses["two"], rel=1e-6)
