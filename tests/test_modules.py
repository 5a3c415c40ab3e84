"""What every kind of module does to a frozen model, against plain formulas put into a plain transformers model."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from by_hand import ACTIVATIONS, by_hand
from tiny import CELLS, CHANNELS, pick, tensors, tiny_backbone, tiny_batch, tiny_hypernet, tiny_model, tiny_modules
from torch import Tensor, nn

from hyperpelt_ds.backbones import Backbone, load_backbone
from hyperpelt_ds.config import Config, HypernetConfig, ModelConfig, ModulesConfig
from hyperpelt_ds.contracts import Batch, Block, Conditions, Weights
from hyperpelt_ds.hypernet import HyperNetwork
from hyperpelt_ds.hypernet.heads import AdapterScale, PrefixWeighting
from hyperpelt_ds.model import HyperPELT

KINDS = ("bart", "marian", "t5", "t5v1.1", "mt5")
BLOCKS = tuple(block.name.lower() for block in Block)
EVERYTHING = dict(
    kinds=("prefix", "adapter", "lora"),
    prefix_weighting="offset",
    adapter_blocks=BLOCKS,
    adapter_norm=True,
    lora_targets=("query", "key", "value", "output", "up", "down"),
    lora_alpha=0.5,
)


def shake(network: nn.Module) -> nn.Module:
    """Moves the numbers that start alike everywhere: factors of adapters and of prefix columns."""
    torch.manual_seed(3)
    for module in network.modules():
        if isinstance(module, (AdapterScale, PrefixWeighting)) and isinstance(module.values, nn.Parameter):
            nn.init.normal_(module.values, mean=0.5)
    return network


def run(backbone: Backbone, weights: Weights | None, batch: Batch) -> Tensor:
    with torch.no_grad():
        return backbone.forward(weights, batch.input_ids, batch.attention_mask, batch.labels)


def equals_by_hand(
    kind: str, image_tokens: bool = False, hypernet: dict[str, Any] | None = None, **modules: Any
) -> None:
    """A mixed padded batch equals its samples by hand, and differs from the model without weights in every sample."""
    backbone = tiny_backbone(kind, **{"train_norms": False, **modules})
    batch = tiny_batch(backbone.model)
    with torch.no_grad():
        weights = shake(tiny_hypernet(backbone, image_tokens=image_tokens, **(hypernet or {})))(batch)
    actual, without = run(backbone, weights, batch), run(backbone, None, batch)
    for row, expected in enumerate(by_hand(backbone, tiny_model(kind), weights, batch)):
        length = len(expected)
        assert torch.allclose(actual[row, :length], expected, atol=2e-4), (actual[row, :length] - expected).abs().max()
        assert not torch.allclose(actual[row, :length], without[row, :length], atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_without_weights_is_the_plain_model(kind):
    backbone, plain = tiny_backbone(kind), tiny_model(kind)
    batch = tiny_batch(plain)
    for row, logits in enumerate(by_hand(backbone, plain, Weights((), None), batch)):
        alone = pick(batch, row)
        expected = plain(input_ids=alone.input_ids, labels=alone.labels).logits[0]
        assert torch.allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("placement", ["parallel", "sequential"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_adapter_on_each_kind_of_block_equals_its_formula(kind, placement, block):
    equals_by_hand(kind, kinds=("adapter",), adapter_blocks=(block,), adapter_placement=placement)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_adapters_have_the_activation_and_the_norm_that_they_are_given(activation, norm):
    settings = dict(adapter_blocks=BLOCKS, adapter_placement="sequential")
    equals_by_hand("t5", kinds=("adapter",), adapter_activation=activation, adapter_norm=norm, **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["parallel", "sequential"])
def test_every_kind_of_module_at_once_equals_the_formulas(kind, placement):
    settings = dict(adapter_placement=placement, adapter_activation="gelu_new", train_norms=True)
    equals_by_hand(kind, image_tokens=True, **EVERYTHING, **settings)


@pytest.mark.parametrize("sharing, learned", [("position", 4), ("shared", 1)])
def test_the_adapters_factors_are_learned_by_position_or_shared_or_fixed(sharing, learned):
    batch = tiny_batch(tiny_model("t5"))

    def network(scale: str) -> HyperNetwork:
        backbone = tiny_backbone(
            "t5", kinds=("adapter",), adapter_scale=scale, adapter_scale_value=2.5, adapter_scale_sharing=sharing
        )
        return tiny_hypernet(backbone, conditions=("task",))

    fixed, trained = network("fixed"), network("learned")
    counts = [sum(parameter.numel() for parameter in one.parameters()) for one in (trained, fixed)]
    assert counts[0] - counts[1] == learned
    for one in (fixed, trained):
        assert torch.equal(one(batch).branches[0].adapter.scale, torch.full((4,), 2.5))
    values = trained.controllers["task"][0].heads["adapter"].scale.values
    with torch.no_grad():
        values.copy_(torch.arange(learned) + 7.0)
    scale = trained(batch).branches[0].adapter.scale
    assert scale.tolist() == ([7.0, 8.0, 9.0, 10.0] if sharing == "position" else [7.0] * 4)
    scale.sum().backward()
    assert values.grad.tolist() == [4 / learned] * learned


def untouched_network(backbone: Backbone, image_tokens: bool = False, **settings: Any) -> HyperNetwork:
    """As training starts: nothing stirred."""
    torch.manual_seed(4)
    available = Conditions(3, CELLS, CHANNELS)
    return HyperNetwork(
        HypernetConfig(**settings), backbone.modules, backbone.geometry, available, backbone.initial_norms, image_tokens
    )


@pytest.mark.parametrize(
    "kind, modules, norm",
    [
        ("t5", ("adapter",), False),
        ("t5", ("adapter",), True),
        ("t5", ("lora",), False),
        ("bart", ("adapter", "lora"), False),
        ("bart", ("adapter", "lora"), True),
    ],
)
@pytest.mark.parametrize("parameters", ["none", "task", "shared"])
def test_new_adapters_and_deltas_are_an_exact_no_op_unless_asked_to_start_at_random(kind, modules, norm, parameters):
    for start in ("no_op", "normal"):
        backbone = tiny_backbone(
            kind,
            kinds=modules,
            adapter_norm=norm,
            adapter_start=start,
            adapter_blocks=BLOCKS,
            lora_targets=("query", "key", "value", "output", "up", "down"),
        )
        batch = tiny_batch(backbone.model)
        conditions = ("task", "image") if parameters == "none" else ("image",)
        network = untouched_network(backbone, parameters=parameters, conditions=conditions, head_std=0.1)
        actual, plain = run(backbone, network(batch), batch), run(backbone, None, batch)
        assert torch.equal(actual, plain) == (start == "no_op")
        if start == "normal":
            assert (actual - plain).abs().max() > 1e-3


TARGETS = {"t5": "query key value output up down", "t5v1.1": "gate up down", "bart": "query key value output up down"}


@pytest.mark.parametrize("kind, target", [(kind, target) for kind in TARGETS for target in TARGETS[kind].split()])
def test_a_low_rank_delta_equals_a_changed_matrix(kind, target):
    equals_by_hand(kind, kinds=("lora",), lora_targets=(target,), hypernet={"head_std": 0.4})


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
@pytest.mark.parametrize("kind", ["t5v1.1", "bart"])
def test_adapters_and_deltas_in_the_same_blocks_work_together(kind, placement):
    gate = ("gate",) if kind == "t5v1.1" else ()
    targets = ("query", "key", "value", "output", *gate, "up", "down")
    settings = dict(adapter_blocks=BLOCKS, adapter_placement=placement, lora_targets=targets, lora_alpha=0.5)
    equals_by_hand(kind, kinds=("adapter", "lora"), **settings)


def test_deltas_are_scaled_by_alpha_over_rank():
    for parameters in ("none", "task"):
        made = []
        for alpha in (16.0, 4.0):
            backbone = tiny_backbone("t5", kinds=("lora",), lora_alpha=alpha)
            network = tiny_hypernet(backbone, parameters=parameters, conditions=("task",))
            made.append(network(tiny_batch(backbone.model)).branches[-1].lora[1])
        assert torch.equal(made[0].down, made[1].down) and made[0].down.abs().min() > 0
        assert torch.allclose(made[0].up, 4 * made[1].up) and made[0].up.abs().min() > 0


@pytest.mark.parametrize("kind", ["t5", "bart", "marian"])
def test_a_target_that_the_model_does_not_have_is_named(kind):
    with pytest.raises(ValueError, match=rf"modules.lora_targets: a {kind} model has no 'gate'"):
        tiny_backbone(kind, kinds=("lora",), lora_targets=("query", "gate"))
    assert tiny_backbone(kind, kinds=("adapter",), lora_targets=("gate",)).geometry.projections == ()


@pytest.mark.parametrize("block", BLOCKS[:3])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_prefixes_go_to_the_named_kinds_of_attention_only(kind, block):
    backbone = tiny_backbone(kind, kinds=("prefix",), prefix_blocks=(block,))
    assert [site.block.name.lower() for site in backbone.geometry.prefix_sites] == [block] * 2
    equals_by_hand(kind, kinds=("prefix",), prefix_blocks=(block,), hypernet={"head_std": 0.4})


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("weighting", ["none", "offset", "gate"])
def test_prefix_columns_are_weighted_before_normalising(kind, weighting):
    equals_by_hand(kind, kinds=("prefix",), prefix_weighting=weighting)
    backbone = tiny_backbone(kind, kinds=("prefix",), prefix_weighting=weighting)
    network = shake(tiny_hypernet(backbone))
    weights = network(tiny_batch(backbone.model))
    for name, branch in zip(network.branch_names, weights.branches, strict=True):
        values = network.controllers[name][0].heads["prefix"].weighting.values
        share = {"none": lambda v: None, "offset": torch.exp, "gate": torch.sigmoid}[weighting](values)
        assert (branch.prefix.offset is None) == (share is None) == (values is None)
        assert share is None or torch.allclose(branch.prefix.offset.exp(), share)


@pytest.mark.parametrize("weighting, start", [("offset", 1.0), ("gate", 0.982)])
def test_weighted_prefix_columns_start_as_good_as_unweighted(weighting, start):
    backbone = tiny_backbone("t5", kinds=("prefix",), prefix_weighting=weighting)
    for branch in untouched_network(backbone)(tiny_batch(backbone.model)).branches:
        assert torch.allclose(branch.prefix.offset.exp(), torch.tensor(start), atol=1e-3)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_offset_far_below_zero_takes_the_prefix_away(kind):
    backbone = tiny_backbone(kind, kinds=("prefix",), prefix_weighting="offset")
    batch = tiny_batch(backbone.model)
    weights = tiny_hypernet(backbone)(batch)
    gone = weights._replace(
        branches=tuple(
            branch._replace(prefix=branch.prefix._replace(offset=torch.full_like(branch.prefix.offset, -1e4)))
            for branch in weights.branches
        )
    )
    plain = run(backbone, None, batch)
    assert torch.allclose(run(backbone, gone, batch), plain, atol=1e-5)
    assert not torch.allclose(run(backbone, weights, batch), plain, atol=1e-2)


# Images as tokens of the encoder


@pytest.mark.parametrize("kind", KINDS)
def test_image_tokens_equal_embeddings_fed_to_a_plain_model_without_places_in_the_text(kind):
    backbone = tiny_backbone(kind, kinds=("adapter",), train_norms=False)
    batch = tiny_batch(backbone.model)
    weights = tiny_hypernet(backbone, image_tokens=True)(batch)._replace(branches=())
    assert weights.tokens.values.shape == (2, CELLS, 16)
    actual, without = run(backbone, weights, batch), run(backbone, None, batch)
    for row, expected in enumerate(by_hand(backbone, tiny_model(kind), weights, batch)):
        has_image = batch.image_rows[row] >= 0
        assert torch.allclose(actual[row, : len(expected)], expected, atol=2e-4)
        assert torch.allclose(actual[row, : len(expected)], without[row, : len(expected)], atol=1e-2) != has_image


@pytest.mark.parametrize("kind", ["bart", "marian"])
def test_words_beside_image_tokens_are_scaled_as_the_model_scales_them(kind):
    plain = tiny_model(kind, scale_embedding=True)
    backbone = Backbone(copy.deepcopy(plain), None, tiny_modules(train_norms=False))
    batch = tiny_batch(plain)
    weights = tiny_hypernet(backbone, image_tokens=True)(batch)._replace(branches=())
    actual = run(backbone, weights, batch)
    for row, expected in enumerate(by_hand(backbone, plain, weights, batch)):
        assert torch.allclose(actual[row, : len(expected)], expected, atol=2e-4)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_other_samples_images_and_longer_texts_change_nothing_for_a_sample(kind):
    backbone = tiny_backbone(kind)
    batch = tiny_batch(backbone.model)
    network = tiny_hypernet(backbone, image_tokens=True)
    before = run(backbone, network(batch), batch)
    other = batch._replace(images=torch.stack([batch.images[0], batch.images[1] + 1]))
    changed = (run(backbone, network(other), other) - before).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == [False, False, False, True]
    room = (4, 6)
    longer = batch._replace(
        input_ids=torch.cat([batch.input_ids, torch.full(room, backbone.model.config.pad_token_id)], 1),
        attention_mask=torch.cat([batch.attention_mask, torch.zeros(room, dtype=torch.long)], 1),
    )
    assert torch.allclose(run(backbone, network(longer), longer), before, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["t5", "bart", "marian"])
def test_generation_reads_image_tokens_with_a_cache_and_beams(kind, beams):
    backbone = tiny_backbone(kind, kinds=("prefix", "adapter", "lora"))
    batch = tiny_batch(backbone.model)
    network = tiny_hypernet(backbone, image_tokens=True)
    weights = network(batch)
    together = backbone.generate(weights, batch.input_ids, batch.attention_mask, 6, beams)
    special = {backbone.model.config.pad_token_id, backbone.model.config.eos_token_id}

    def text(ids: Tensor) -> list[int]:
        return [token for token in ids.tolist() if token not in special]

    for row in range(4):
        alone = pick(batch, row)
        ids = backbone.generate(network(alone), alone.input_ids, alone.attention_mask, 6, beams)[0]
        assert text(together[row]) == text(ids)
    if beams == 1:
        labels = together[:, 1:].clone()
        greedy = backbone.forward(weights, batch.input_ids, batch.attention_mask, labels).argmax(-1)
        for row in range(4):
            ends = (labels[row] == backbone.model.config.eos_token_id).nonzero()
            end = int(ends[0]) if len(ends) else labels.shape[1] - 1
            assert torch.equal(greedy[row, : end + 1], labels[row, : end + 1])
    blind = weights._replace(tokens=None)
    logits = [run(backbone, w, batch)[1:] for w in (weights, blind)]
    assert (logits[0] - logits[1]).abs().max() > 1e-2


# Taking part in every step


def hyperpelt(kind: str, modules: ModulesConfig, *overrides: str) -> HyperPELT:
    """A model of tiny parts, all of whose parts matter."""
    config = Config().override(
        ["vision.encoder=resnet18", f"vision.cells={CELLS}", f"vision.channels={CHANNELS}", *overrides]
    )
    config = dataclasses.replace(config, modules=modules)
    train = config.model.train_backbone
    torch.manual_seed(5)
    said = torch.randn(3, 6) if "description" in config.hypernet.conditions else None
    return HyperPELT(config, Backbone(tiny_model(kind), None, modules, train), ("a", "b", "c"), said)


def without_images(batch: Batch) -> Batch:
    return batch._replace(
        images=torch.zeros(1, CELLS, CHANNELS),
        image_rows=torch.full_like(batch.image_rows, -1),
        samples=tuple(sample._replace(image=None) for sample in batch.samples),
    )


def combinations(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(names, n + 1) for n in range(len(names)))


@pytest.mark.parametrize("kinds", combinations(("prefix", "adapter", "lora")))
@pytest.mark.parametrize("parameters", ["none", "task", "shared"])
def test_every_trainable_takes_part_in_every_step_with_images_and_without(kinds, parameters):
    settings = [f"hypernet.parameters={parameters}", "vision.tokens=true"]
    if parameters == "shared" and "prefix" in kinds:
        settings.append("hypernet.prefix_mlp=5")
    model = hyperpelt("t5", tiny_modules(kinds=kinds, prefix_weighting="gate", adapter_norm=True), *settings)
    batch = tiny_batch(model.backbone.model)
    for step in (batch, without_images(batch), batch):
        model.zero_grad()
        model(step).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        tokens = model.hypernet.image_tokens.project.weight
        assert bool(tokens.grad.any()) == any(sample.image for sample in step.samples)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("parameters", ["none", "task", "shared"])
def test_nothing_stays_dead_that_starts_behind_a_zero(parameters, norm):
    modules = tiny_modules(kinds=("prefix", "adapter", "lora"), prefix_weighting="offset", adapter_norm=norm)
    conditions = "task,image" if parameters == "none" else "image"
    settings = (f"hypernet.parameters={parameters}", f"hypernet.conditions={conditions}", "vision.tokens=true")
    model = hyperpelt("bart", modules, *settings)
    batch = tiny_batch(model.backbone.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # a zero hides what comes before it from the first step
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []
    weights = model.hypernet(batch)
    for tensor in tensors(weights):
        tensor.retain_grad()
    logits = model.backbone.forward(weights, batch.input_ids, batch.attention_mask, batch.labels)
    logits.logsumexp(-1).sum().backward()
    for tensor in tensors(weights):
        assert tensor.grad.flatten(1).any(1).all() if tensor.ndim > 1 else tensor.grad.all()  # at every site


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_activation_checkpointing_changes_no_gradient_of_any_kind_of_module(kind, placement):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(kind)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        backbone = Backbone(model, None, tiny_modules(**EVERYTHING, adapter_placement=placement))
        backbone.train()
        batch = tiny_batch(model)
        network = tiny_hypernet(backbone, image_tokens=True)
        logits = backbone.forward(network(batch), batch.input_ids, batch.attention_mask, batch.labels)
        logits.logsumexp(-1).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        assert (gradient - gradients[1][name]).norm() < 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("kind", ["t5", "bart", "marian"])
def test_every_kind_of_module_runs_in_bfloat16_and_stays_near_float32(kind):
    backbone = tiny_backbone(kind, **EVERYTHING)
    batch = tiny_batch(backbone.model)
    with torch.no_grad():
        weights = tiny_hypernet(backbone, image_tokens=True)(batch)
    expected = run(backbone, weights, batch)
    half = Backbone(tiny_model(kind).to(torch.bfloat16), None, backbone.modules)
    actual = run(half, weights, batch)
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() < 0.1 * expected.norm()  # bf16 keeps 8 bits; errors add over 2+2 layers
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(backbone, weights, batch)
    assert (mixed.float() - expected).norm() < 0.1 * expected.norm()


# The backbone itself


def test_norms_stay_the_models_own_unless_they_are_trained():
    backbone = tiny_backbone("bart", train_norms=False)
    network = tiny_hypernet(backbone)
    assert network.norms is None and network(tiny_batch(backbone.model)).norms is None
    trained = tiny_hypernet(tiny_backbone("bart"))
    difference = [sum(p.numel() for p in one.parameters()) for one in (trained, network)]
    assert difference[0] - difference[1] == backbone.initial_norms.numel() == 12 * 2 * 16  # weights and biases


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_full_fine_tuning_registers_the_whole_backbone_and_nothing_else(kind):
    model = hyperpelt(kind, tiny_modules(kinds=()), "model.train_backbone=true")
    plain = tiny_model(kind)
    batch = tiny_batch(plain)
    assert set(model.state_dict()) == {f"trained_backbone.{name}" for name in plain.state_dict()}
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    assert model.parameter_counts() == {"trainable": plain.num_parameters(), "total": plain.num_parameters()}
    assert model.hypernet(batch) == Weights((), None)
    inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    assert torch.allclose(run(model.backbone, model.hypernet(batch), batch), plain(**inputs).logits, atol=1e-5)
    plain.train()
    model.train()
    model(batch).loss.backward()
    losses = [plain(**{name: t[i : i + 1] for name, t in inputs.items()}).loss for i in range(4)]
    torch.stack(losses).mean().backward()
    for (name, parameter), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None and parameter.grad.any(), name
        assert torch.allclose(parameter.grad, reference.grad, atol=1e-4), name


def test_a_trained_backbone_sees_images_as_tokens():
    model = hyperpelt("t5", tiny_modules(kinds=()), "model.train_backbone=true", "vision.tokens=true")
    batch = tiny_batch(model.backbone.model)
    before = model(batch).sample_losses
    changed = (model(batch._replace(images=batch.images.flip(0))).sample_losses - before).abs() > 1e-4
    assert changed.tolist() == [False, True, True, True]
    for step in (batch, without_images(batch)):
        model.zero_grad()
        model(step).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_backbone_is_frozen_unless_it_is_trained(kind):
    model = hyperpelt(kind, tiny_modules(kinds=("prefix", "adapter", "lora")), "vision.tokens=true")
    model(tiny_batch(model.backbone.model)).loss.backward()
    assert all(not p.requires_grad and p.grad is None for p in model.backbone.model.parameters())
    assert not any("backbone" in name for name, _ in model.named_parameters())


def test_t5_in_float16_is_refused_by_name(tmp_path):
    tiny_model("t5").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model.dtype: .* t5 models leave the range of float16.*use bfloat16"):
        load_backbone(ModelConfig(backbone=str(tmp_path), dtype="float16"))
