"""Frozen linear maps with int8 weights: near the float ones, a quarter of the bytes, also while training."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import free_port
from test_train import figures, final_weights
from tiny import tiny_backbone, tiny_batch, tiny_hypernet

from hyperpelt_ds import counts, export, recipes
from hyperpelt_ds import model as models
from hyperpelt_ds.backbones.int8 import parts_of
from hyperpelt_ds.train import partitions
from hyperpelt_ds.train.checkpoint import _FREE_TO_CHANGE

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="the extra int8 is not installed"
)
KINDS = ("t5", "t5v1.1", "marian", "llama")


def step(backbone: Any, saved: list[torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch and the gradient of all trainables, in one row; what autograd keeps goes to `saved`."""
    network, batch = tiny_hypernet(backbone), tiny_batch(backbone.model)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if saved is not None:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = backbone.forward(
            network(batch), batch.input_ids, batch.attention_mask, batch.labels, batch.targets
        )  # fmt: skip
        loss = F.cross_entropy(logits.float(), batch.labels.flatten()[batch.targets])
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def int8(kind: str) -> Any:
    backbone = tiny_backbone(kind)
    backbone.quantize()
    return backbone


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_near_those_of_float(kind):
    (loss, gradient), (near, near_gradient) = step(tiny_backbone(kind)), step(int8(kind))
    assert loss != near and float(near) == pytest.approx(float(loss), rel=0.02)
    assert F.cosine_similarity(gradient, near_gradient, dim=0) > 0.98  # random maps of 16 numbers, sharp attention


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_maps_that_the_integers_stand_for(kind):
    exact, given = tiny_backbone(kind), int8(kind)
    plain, weights = dict(exact.model.named_parameters()), dict(given.model.named_parameters())
    quantised = [name for name, weight in weights.items() if len(parts_of(weight)[0]) > 1]
    assert quantised
    for name in quantised:
        plain[name].data = weights[name].dequantize()
    (loss, gradient), (same, same_gradient) = step(exact), step(given)
    assert torch.allclose(loss, same, rtol=1e-5) and torch.allclose(gradient, same_gradient, rtol=1e-3, atol=1e-5)


@needs_torchao
def test_the_linear_function_that_deepspeed_puts_in_place_at_stage_3_is_not_asked(monkeypatch):
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    given = int8("t5")
    before = step(given)
    monkeypatch.setattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", F.linear, raising=False)
    monkeypatch.setattr(F, "linear", zero3_linear_wrap)
    with pytest.raises(NotImplementedError):  # if torchao's weights can do that by now, any function would do
        step(given)
    partitions.leave_frozen_maps_alone()  # as engine.start does
    after = step(given)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@needs_torchao
def test_autograd_keeps_integers_and_torchao_alone_would_not():
    given = int8("t5v1.1")
    linear = given.model.encoder.block[0].layer[1].DenseReluDense.wo
    saved: list[torch.Tensor] = []
    step(given, saved)
    kept = parts_of(linear.weight)[0]["qdata"]
    assert any(tensor.data_ptr() == kept.data_ptr() for tensor in saved)
    weights = {tuple(w.shape) for w in given.model.parameters() if len(parts_of(w)[0]) > 1}
    assert not [t for t in saved if t.is_floating_point() and tuple(t.shape[::-1]) in weights and t.ndim == 2]
    alone: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (alone.append(t), t)[1], lambda t: t):
        F.linear(torch.ones(1, linear.in_features, requires_grad=True), linear.weight)
    full = [t for t in alone if t.is_floating_point() and t.numel() == linear.weight.numel()]
    assert full, "if torchao keeps integers by now, _FrozenLinear can go"


@needs_torchao
def test_a_large_model_has_about_a_quarter_of_the_bytes():
    recipe = recipes.get("glue_t5_base").override(["model.backbone=google/t5-v1_1-xxl"])
    whole, quantised = (counts.estimate(recipe.override([f"model.quantize={how}"])) for how in ("none", "int8"))
    assert 0.25 < quantised.backbone_bytes["1"] / whole.backbone_bytes["1"] < 0.28
    assert quantised.total == whole.total


@needs_torchao
def test_the_integers_have_a_fingerprint_of_their_own_and_answers_can_be_generated(config):
    plain, given = (models.build(c, ["movie_rating"]) for c in (config, config.override(["model.quantize=int8"])))
    assert given.backbone.fingerprint() == models.build(
        config.override(["model.quantize=int8"]), ["movie_rating"]
    ).backbone.fingerprint() != plain.backbone.fingerprint()  # fmt: skip
    batch, network = tiny_batch(given.backbone.model), given.eval()
    batch = batch._replace(tasks=torch.zeros(2, dtype=torch.long), images=torch.zeros(2, 4, 16))
    assert network.generate(batch, 4).shape[0] == 4


@needs_torchao
@pytest.mark.parametrize("form", ["materialised", "absorbed"])
@pytest.mark.parametrize("kinds", [("prefix", "adapter"), ("lora",)])
def test_every_kind_of_module_and_both_forms_of_prefixes_work_beside_integers(form, kinds):
    backbone = tiny_backbone("t5", kinds=kinds, lora_targets=("query", "up"))
    backbone.prefix_form = form
    backbone.quantize()
    loss, gradient = step(backbone)
    assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().sum() > 0


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"model\.quantize: 'int8' needs .* pip install 'hyperpelt-ds\[int8\]'"):
        tiny_backbone("t5").quantize()


def test_another_precision_of_the_weights_is_another_run():
    assert "model.quantize" not in _FREE_TO_CHANGE and "model.shard_backbone" in _FREE_TO_CHANGE


@needs_torchao
@pytest.mark.slow
def test_two_ranks_train_go_on_and_are_scored_beside_integers(train_many, run_python, with_dropout, tmp_path):
    """At stage 2, and split over the ranks at stage 3; the integers are at the end what they were at the start."""
    given = with_dropout.override(["model.quantize=int8"])
    jobs = {
        "whole": (given, "ds_configs/zero2_cpu.json", tmp_path / "whole"),
        "split": (given.override(["model.shard_backbone=true"]), "ds_configs/zero3_cpu.json", tmp_path / "split"),
    }
    train_many({"plain": (with_dropout, "ds_configs/zero2_cpu.json", tmp_path / "plain"), **jobs})
    losses = {name: figures(tmp_path / name, "train/loss") for name in jobs}
    plain = figures(tmp_path / "plain", "train/loss")
    assert losses["whole"] != plain and losses["whole"] == pytest.approx(plain, rel=0.05)
    assert losses["split"] == pytest.approx(losses["whole"], rel=1e-6) and len(plain) == 9
    frozen = models.build(given, ["movie_rating"]).backbone.fingerprint()
    ends = {}
    for name in jobs:
        for step in (6, 9):
            state = tmp_path / name / f"step_{step:08}" / "state.json"
            assert json.loads(state.read_text())["backbone"] == frozen
        ends[name] = final_weights(tmp_path / name)
        shutil.rmtree(tmp_path / name / "step_00000009")
    train_many(jobs, resume=True)
    for name in jobs:
        assert figures(tmp_path / name, "train/loss") == losses[name]
        assert all(torch.equal(tensor, ends[name][key]) for key, tensor in final_weights(tmp_path / name).items())
    scores = []
    for processes in (1, 2):
        out = tmp_path / f"scores{processes}.json"
        done = run_python(
            *("deepspeed", "--master_port", free_port(), "--num_accelerators", processes, "launch/evaluate.py"),
            *("--run_dir", tmp_path / "split", "--tasks", "movie_rating", "--shuffle", "none", "--out", out),
            timeout=900,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        scores.append(json.loads(out.read_text())["tasks"])
    assert scores[0] == scores[1] and scores[0]


@needs_torchao
def test_weights_that_were_trained_beside_integers_are_not_exported(config, tmp_path):
    model = models.build(config.override(["model.quantize=int8"]), ["movie_rating"])
    run = models.Predictor(config.override(["model.quantize=int8", "data.tasks=movie_rating"]), model)
    with pytest.raises(ValueError, match=r"was trained beside int8 weights \(model\.quantize\)"):
        export._check(run, tmp_path, "movie_rating", None, "safetensors")
