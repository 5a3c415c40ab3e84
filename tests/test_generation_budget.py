"""A whole model under model.generation_budget_mb: the same loss and gradients, with few generated weights at a time."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT
from tiny import KINDS, stir, tiny_batch, tiny_model
from torch import Tensor

from hyperpelt_ds import config as configs
from hyperpelt_ds.backbones import Backbone
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Adapter, Batch, Unmade
from hyperpelt_ds.model import HyperPELT

sys.path.insert(0, str(ROOT / "launch"))

from live_bytes import LiveBytes

SETTINGS = (
    "modules.prefix_length=3",
    "modules.bottleneck=4",
    "modules.lora_rank=2",
    "hypernet.hyper_size=2",  # eight conditions then make a chunk of one site worthwhile
    "hypernet.hidden_size=16",
    "hypernet.projector_norm=false",
    "hypernet.head_std=0.3",
    "vision.encoder=resnet18",
    "vision.cells=5",
    "vision.channels=7",
)
TINY, MOST = 1e-6, 0.75


def model_of(kind: str, *overrides: str, checkpointing: bool = False) -> HyperPELT:
    """In float64, so that a difference is a mistake."""
    config = Config().override([*SETTINGS, 'modules.kinds=["adapter","lora"]', *overrides])
    model = tiny_model(kind).double()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(3)
    made = HyperPELT(config, Backbone(model, None, config.modules), ["a", "b", "c"]).double()
    stir(made)
    return made.train()


def batch_of(model: HyperPELT, images: bool = True) -> Batch:
    """Twice the tiny batch: eight samples of two tasks, each with an image of its own, or none."""
    one = tiny_batch(model.backbone.model)

    def twice(part: Tensor) -> Tensor:
        return part.repeat_interleave(2, 0)

    labels = twice(one.labels)
    samples = [sample._replace(image="x" if images else None) for sample in one.samples for _ in range(2)]
    return one._replace(
        input_ids=twice(one.input_ids),
        attention_mask=twice(one.attention_mask),
        labels=labels,
        targets=(labels.flatten() != -100).nonzero().squeeze(1),
        task_rows=twice(one.task_rows),
        images=torch.randn(8, 5, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64),
        image_rows=torch.arange(8) if images else torch.full((8,), -1),
        loss_weights=torch.full((8,), 0.125),
        samples=tuple(samples),
    )


def generated(model: HyperPELT, batch: Batch) -> int:
    """Bytes of all adapters and deltas of a batch."""
    counts = {"task": len(batch.tasks), "image": len(batch.images)}
    return 8 * model.hypernet.numbers({name: counts[name] for name in model.hypernet.conditions})


def outcome(model: HyperPELT, batch: Batch, budget: float | None) -> tuple[Tensor, dict[str, Tensor]]:
    model.generation_budget = budget
    model.zero_grad()
    loss = model(batch).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def alike(one: tuple[Tensor, dict[str, Tensor]], two: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.allclose(one[0], two[0], rtol=0, atol=1e-12)
    for name, gradient in two[1].items():
        assert (one[1][name] - gradient).norm() <= 1e-10 * max(1.0, float(gradient.norm())), name


def unmade(model: HyperPELT, batch: Batch, budget: float) -> list[int]:
    """How many sites a chunk of each kind has that is made for images, if it is not made at once."""
    branches = model.hypernet(batch, True, int(budget * 2**20 / 8)).branches
    branch = branches[model.hypernet.branch_names.index("image")]
    kinds = [kind for kind in (branch.adapter, *(branch.lora or ())) if kind is not None]
    flat = [one for kind in kinds for one in ([kind] if hasattr(kind, "_fields") else kind)]
    return [one.at_once for one in flat if isinstance(one, Unmade)]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_are_the_same_whatever_the_budget(kind):
    model = model_of(kind)
    batch = batch_of(model)
    expected = outcome(model, batch, None)
    assert all(gradient.abs().sum() > 0 for name, gradient in expected[1].items() if "norms" not in name)
    sites = len(model.backbone.geometry.adapter_sites)
    assert unmade(model, batch, TINY)[0] == 1, "the images' adapters, site by site"
    most = MOST * generated(model, batch) / 2**20
    assert unmade(model, batch, most)[0] == int(MOST * sites)
    assert unmade(model, batch, 1) == []
    for budget in (TINY, most, 1):
        alike(outcome(model, batch, budget), expected)


@pytest.mark.parametrize(
    "overrides",
    [
        ("hypernet.copies=2",),
        ("modules.adapter_norm=true", "modules.adapter_placement=sequential"),
        ('modules.kinds=["prefix","adapter"]', "modules.adapter_blocks=encoder_self,encoder_ffn,decoder_cross"),
        ("hypernet.parameters=task", "hypernet.conditions=image"),
    ],
    ids=lambda overrides: overrides[0],
)
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_so_they_are_however_modules_are_placed_and_made(kind, overrides):
    model = model_of(kind, *overrides)
    batch = batch_of(model)
    assert unmade(model, batch, TINY)
    alike(outcome(model, batch, TINY), outcome(model, batch, None))


@pytest.mark.parametrize("budget", [TINY, 0.005])
@pytest.mark.parametrize("kind", ["t5", "bart", "llama"])
def test_so_they_are_with_activation_checkpointing(kind, budget):
    model = model_of(kind, checkpointing=True)
    batch = batch_of(model)
    assert unmade(model, batch, budget)
    alike(outcome(model, batch, budget), outcome(model_of(kind), batch, None))


def test_gradients_of_micro_batches_add_up():
    model = model_of("t5")
    batches = [batch_of(model), batch_of(model, images=False)]
    sums = []
    for budget in (None, TINY):
        model.generation_budget = budget
        model.zero_grad()
        for batch in batches:
            model(batch).loss.backward()
        sums.append((torch.zeros(()), {name: parameter.grad for name, parameter in model.named_parameters()}))
        assert all(gradient is not None for gradient in sums[-1][1].values())
    alike(sums[1], sums[0])


def test_every_trainable_takes_part_in_a_batch_without_images_too():
    model = model_of("t5")
    batch = batch_of(model, images=False)
    assert unmade(model, batch, TINY), "made of the images that no sample has"
    alike(outcome(model, batch, TINY), outcome(model, batch, None))
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_validation_gives_the_same_losses_and_decoding_the_same_answers():
    model = model_of("bart").eval()
    batch = batch_of(model)
    losses, answers = [], []
    for budget in (None, TINY):
        model.generation_budget = budget
        with torch.no_grad():
            losses.append(model(batch).sample_losses)
        answers.append(model.generate(batch, 6, 2))
    assert torch.allclose(losses[0], losses[1], atol=1e-12)
    assert torch.equal(*answers)


def test_what_is_not_over_the_budget_is_made_at_once_as_without_one():
    model = model_of("t5")
    batch = batch_of(model)
    most = generated(model, batch) // 8
    assert isinstance(model.hypernet(batch, True, most).branches[1].adapter, Adapter)
    assert isinstance(model.hypernet(batch, True, most - 1).branches[1].adapter, Unmade)


def test_a_training_step_holds_a_small_part_of_the_generated_bytes():
    kinds = ('modules.kinds=["adapter"]', "modules.bottleneck=64", "hypernet.conditions=image")
    model = model_of("t5", *kinds)
    batch, largest = batch_of(model), 8 * 8 * 16 * 64  # bytes of an adapter's down or up for eight images
    known = [*model.parameters(), *model.backbone.model.parameters()]
    peaks = []
    for budget in (None, TINY):
        model.generation_budget = budget
        with LiveBytes(known, at_least=largest) as live:
            model(batch).loss.backward()
        peaks.append(live.peak)
    site = generated(model, batch) // 4
    assert peaks[0] > 8 * site, "weights and gradients of four sites"
    assert peaks[1] <= 1.1 * 2 * site, "those of one site"


@pytest.mark.parametrize("value", ["0", "-1", "1e999", '"much"', "true"])
def test_a_budget_that_is_none_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"model\.generation_budget_mb"):
        Config().override([f"model.generation_budget_mb={value}"])
    assert Config().override(["model.generation_budget_mb=512"]).model.generation_budget_mb == 512
    assert configs.from_dict(configs.to_dict(Config())).model.generation_budget_mb is None


@pytest.mark.slow
def test_two_ranks_learn_the_same_from_chunks_at_every_stage_though_zero_3_takes_the_map_away(
    train_many, config, tmp_path
):
    whole = config.override(
        ["hypernet.hyper_size=2", "hypernet.projector_norm=false", 'modules.kinds=["prefix","adapter","lora"]',
         "data.tasks=easy_vqa,shape_caption", "train.micro_batch=8", "train.global_batch=32"]
    )  # fmt: skip
    chunks = whole.override([f"model.generation_budget_mb={TINY}"])
    again = chunks.override(["model.activation_checkpointing=true"])
    settings = {stage: json.loads((ROOT / "ds_configs/zero2_cpu.json").read_text()) for stage in (1, 2)}
    settings[1]["zero_optimization"]["stage"] = 1
    settings[3] = json.loads((ROOT / "ds_configs/zero3_cpu.json").read_text())
    for stage, tree in settings.items():
        (tmp_path / f"zero{stage}.json").write_text(json.dumps(tree))
    jobs: dict[str, Any] = {
        name: (made, tmp_path / f"zero{stage}.json", tmp_path / name)
        for name, made, stage in (
            ("whole", whole, 2), ("one", chunks, 1), ("two", chunks, 2), ("three", chunks, 3), ("again", again, 3)
        )
    }  # fmt: skip
    train_many(jobs)
    losses = {}
    for name in jobs:
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses["whole"]) > 5
    for name in ("one", "two", "three", "again"):
        assert losses[name] == pytest.approx(losses["whole"], rel=1e-5), name
    assert losses["two"] != losses["whole"], "sums over chunks round in another way: there were some"
