"""The whole model: loss, mixed batches, generation, and what a finished run's folder gives back."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tiny import CELLS, CHANNELS, KINDS, pick, tiny_backbone, tiny_batch, tiny_hypernet, tiny_model, tiny_modules

from hyperpelt_ds.backbones import Backbone
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Branch, Weights
from hyperpelt_ds.model import HyperPELT, _check_lengths, weights_file


def tiny(kind: str = "marian", *overrides: str, dropout: float = 0.0) -> HyperPELT:
    config = Config().override(
        ["vision.encoder=resnet18", f"vision.cells={CELLS}", f"vision.channels={CHANNELS}", *overrides]
    )
    model = HyperPELT(config, tiny_backbone(kind, dropout), ("a", "b", "c"))
    model.hypernet = tiny_hypernet(model.backbone)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_weighted_sum_of_the_samples_one_by_one(kind):
    model = tiny(kind)
    batch = tiny_batch(model.backbone.model)
    batch = batch._replace(loss_weights=torch.tensor([0.5, 0.0, 1.0, 2.0]))
    output = model(batch)
    alone = torch.stack([model(pick(batch, row)).sample_losses[0] for row in range(4)])
    assert torch.allclose(output.sample_losses, alone, atol=1e-4)
    assert torch.allclose(output.loss, (alone * batch.loss_weights).sum(), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_mixed_batch_are_the_sum_of_its_samples(kind):
    model = tiny(kind)
    batch = tiny_batch(model.backbone.model)

    def gradients(*batches):
        model.zero_grad()
        for one in batches:
            model(one).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    together, apart = gradients(batch), gradients(*(pick(batch, row) for row in range(4)))
    for name, gradient in together.items():
        assert gradient.norm() > 0, name
        assert (gradient - apart[name]).norm() < 2e-4 * gradient.norm(), name  # fp32 sums in another order


def test_every_trainable_takes_part_in_a_batch_without_images():
    model = tiny()
    batch = tiny_batch(model.backbone.model)
    text = batch._replace(
        images=torch.zeros(1, CELLS, CHANNELS),
        image_rows=torch.full((4,), -1),
        samples=tuple(sample.__class__(sample.key, sample.task, "", "") for sample in batch.samples),
    )
    model(text).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(parameter.grad.any() for parameter in model.hypernet.controllers["image"].parameters())
    assert model.hypernet.conditions["task"].embedding.table.weight.grad.abs().sum(1).gt(0).tolist() == [
        True,
        False,
        True,
    ]


def test_samples_without_a_task_row_in_the_batch_get_no_gradient_and_images_matter():
    model = tiny()
    batch = tiny_batch(model.backbone.model)
    before = model(batch).sample_losses
    after = model(batch._replace(images=batch.images.flip(0))).sample_losses
    changed = (before - after).abs() > 1e-4
    assert changed.tolist() == [False, True, True, True]  # the first sample has no image


def test_only_the_trainables_are_registered_and_counted():
    model = tiny()
    assert not any("backbone" in name for name in model.state_dict())
    plain = sum(parameter.numel() for parameter in tiny_model("marian").parameters())
    counts = model.parameter_counts()
    assert counts["trainable"] == sum(parameter.numel() for parameter in model.hypernet.parameters())
    assert counts["total"] == plain + counts["trainable"] - model.backbone.initial_norms.numel()


def test_training_mode_reaches_the_backbone_and_evaluation_is_deterministic():
    model = tiny(dropout=0.5)
    batch = tiny_batch(model.backbone.model)
    model.train()
    assert not torch.equal(model(batch).loss, model(batch).loss)
    model.eval()
    assert torch.equal(model(batch).loss, model(batch).loss)


@pytest.mark.parametrize("beams", [1, 4])
def test_weights_are_generated_exactly_once_for_a_whole_generation(beams):
    model = tiny().eval()
    calls = []
    model.hypernet.controllers["task"][0].heads["prefix"].linear.register_forward_hook(
        lambda *_: calls.append("prefix")
    )
    model.hypernet.controllers["image"][0].heads["adapter"].linear.register_forward_hook(
        lambda *_: calls.append("adapter")
    )
    batch = tiny_batch(model.backbone.model)
    ids = model.generate(batch, max_new_tokens=7, num_beams=beams)
    assert ids.shape[0] == 4 and ids.shape[1] > 3
    assert sorted(calls) == ["adapter", "prefix"]


def test_generated_weights_equal_weights_stored_beforehand():
    model = tiny().eval()
    batch = tiny_batch(model.backbone.model)
    alone = [model.hypernet(pick(batch, row)) for row in range(4)]  # each sample's weights, made and kept one by one

    def stack(branch: int, module: str):
        def join(columns):
            if columns[0] is None or columns[0].ndim == 1:  # without a condition: scales
                return columns[0]
            return torch.cat(columns, 1).detach()

        parts = [getattr(weights.branches[branch], module) for weights in alone]
        return type(parts[0])(*map(join, zip(*parts, strict=True)))

    rows = torch.arange(4), torch.where(batch.image_rows < 0, -1, torch.arange(4))
    stored = Weights(
        tuple(Branch(rows[i], stack(i, "prefix"), stack(i, "adapter")) for i in range(2)), alone[0].norms.detach()
    )

    def logits(weights: Weights | None) -> torch.Tensor:
        return model.backbone.forward(weights, batch.input_ids, batch.attention_mask, batch.labels)

    assert torch.allclose(logits(stored), logits(model.hypernet(batch)), atol=1e-4)
    assert not torch.allclose(logits(stored), logits(None), atol=1e-1)


def test_label_smoothing_counts_while_training_only():
    plain, smooth = tiny(), tiny("marian", "train.label_smoothing=0.3")
    batch = tiny_batch(plain.backbone.model)
    assert torch.allclose(plain.eval()(batch).sample_losses, smooth.eval()(batch).sample_losses, atol=1e-5)
    assert not torch.allclose(plain.train()(batch).sample_losses, smooth.train()(batch).sample_losses, atol=5e-2)


def test_the_weights_of_a_run_are_the_best_else_the_latest(tmp_path):
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        weights_file(tmp_path)
    for name in ("step_00000010", "best"):
        (tmp_path / name).mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "step_00000010/weights.safetensors")
    (tmp_path / "LATEST").write_text("step_00000010\n")
    assert weights_file(tmp_path).parent.name == "step_00000010"
    save_file({"x": torch.ones(1)}, tmp_path / "best/weights.safetensors")
    assert weights_file(tmp_path).parent.name == "best"


@pytest.mark.parametrize(
    "kind, given, refused",
    [
        ("marian", ["data.max_source_length=64", "data.max_target_length=64"], None),
        ("marian", ["data.max_source_length=65"], "data.max_source_length 65 are more than the 64 positions"),
        ("marian", ["data.max_source_length=60", "vision.tokens=true"], "60 .* vision.cells 5 are more than the 64"),
        ("llama", ["data.max_source_length=40", "data.max_target_length=24"], None),
        (
            "llama",
            ["data.max_source_length=40", "data.max_target_length=25"],
            "40 .* 25 are more than the 64",
        ),
        ("t5", ["data.max_source_length=9999"], None),
    ],
)
def test_lengths_must_fit_the_models_positions(kind, given, refused):
    cells = ["vision.encoder=resnet18", f"vision.cells={CELLS}"]
    config = Config().override([*cells, "data.max_target_length=8", *given])
    backbone = tiny_backbone(kind)
    if refused is None:
        return _check_lengths(config, backbone)
    with pytest.raises(ValueError, match=refused):
        _check_lengths(config, backbone)


@pytest.mark.parametrize("kind", ["marian", "bart"])  # the other families' norms compute in float32 whatever they get
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_the_whole_model_are_those_of_finite_differences(kind, checkpointing):
    model = tiny_model(kind).double()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    backbone = Backbone(model, None, tiny_modules())
    backbone.train()
    batch = tiny_batch(model)
    batch = batch._replace(images=batch.images.double())
    network = tiny_hypernet(backbone).double()

    def loss() -> torch.Tensor:
        logits = backbone.forward(network(batch), batch.input_ids, batch.attention_mask, batch.labels)
        return logits.logsumexp(-1).sum()

    loss().backward()
    step = 1e-6
    for name, parameter in network.named_parameters():
        direction = torch.randn_like(parameter)
        expected = float((parameter.grad * direction).sum())
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                ends.append(float(loss()))
                parameter.sub_(sign * step * direction)
        assert expected != 0 and (ends[0] - ends[1]) / (2 * step) == pytest.approx(expected, rel=1e-4), name
