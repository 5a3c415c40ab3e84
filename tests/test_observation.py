"""What a look at the model finds, against formulas and one sample at a time."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import CELLS, CHANNELS, pick, stir, tiny_batch, tiny_model
from torch import Tensor

from hyperpelt_ds.backbones import Backbone
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Batch, Block, Weights
from hyperpelt_ds.kernels.prefix_attention import SitePrefix, prefix_share
from hyperpelt_ds.model import HyperPELT
from hyperpelt_ds.train.observation import Observation, look
from hyperpelt_ds.train.watch import Watch

TASKS = ("a", "b", "c")
SETTINGS = (
    "modules.prefix_length=3",
    "modules.bottleneck=4",
    "modules.lora_rank=2",
    "hypernet.embedding_size=6",
    "hypernet.hidden_size=16",
    "hypernet.hyper_size=8",
    "hypernet.head_std=0.2",
    "vision.encoder=resnet18",
    f"vision.cells={CELLS}",
    f"vision.channels={CHANNELS}",
    f"data.tasks={json.dumps(TASKS)}",
)


def tiny(*overrides: str, kind: str = "marian") -> tuple[HyperPELT, Config]:
    """A model in float64, so that a difference is a mistake, and its configuration."""
    config = Config().override([*SETTINGS, *overrides])
    backbone = Backbone(
        tiny_model(kind).double(), None, config.modules, config.model.train_backbone, config.model.prefix_form
    )
    torch.manual_seed(3)
    model = HyperPELT(config, backbone, TASKS).double()
    stir(model)
    return model.train(), config


def three_tasks(model: HyperPELT) -> Batch:
    """The tiny batch with its four samples of three tasks."""
    batch = tiny_batch(model.backbone.model)
    samples = tuple(s._replace(task=name) for s, name in zip(batch.samples, "aabc", strict=True))
    return batch._replace(tasks=torch.arange(3), task_rows=torch.tensor([0, 0, 1, 2]), samples=samples)


def step(model: HyperPELT, *batches: Batch) -> Watch:
    """What is heard of a step of these micro-batches."""
    model.zero_grad()
    watch = Watch(model)
    for batch in batches:
        with watch.listening(batch):
            loss = model(batch).loss
        loss.backward()
    watch.note_gradients(lambda parameter: parameter.grad, 1.0)
    return watch


def seen(model: HyperPELT, config: Config, watch: Watch) -> Observation:
    norm = float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())
    found = look(model, config, 7, watch, norm, dict.fromkeys(TASKS, 1 / 3), {"a": 1, "b": 1, "c": 2})
    assert found is not None
    json.dumps(found.record, allow_nan=False)
    return found


def one_by_one(model: HyperPELT, batch: Batch, branch: int, part: str) -> Tensor:
    """The gradient of each task's loss with respect to what is generated of `part` for it, (T, numbers)."""
    rows = []
    for task in range(len(TASKS)):
        kept: list[Weights] = []
        hook = model.hypernet.register_forward_hook(lambda module, args, output: kept.append(output))  # noqa: B023
        weights = batch.loss_weights * (batch.tasks[batch.task_rows] == task)
        loss = model(batch._replace(loss_weights=weights)).loss
        hook.remove()
        module = getattr(kept[0].branches[branch], part)
        names = {"prefix": ("keys", "values") if hasattr(module, "keys") else ("rows",)}
        wanted = [getattr(module, name) for name in names.get(part, ("down", "down_bias", "up", "up_bias"))]
        gradients = torch.autograd.grad(loss, wanted)
        rows.append(torch.cat([gradient[:, task].flatten() for gradient in gradients]))
    return torch.stack(rows)


def cosines(rows: Tensor) -> Tensor:
    return F.cosine_similarity(rows.unsqueeze(0), rows.unsqueeze(1), dim=-1)


@pytest.mark.parametrize("form", ["auto", "materialised", "absorbed"])
def test_conflict_is_the_cosine_of_the_gradients_of_the_tasks_losses(form):
    model, config = tiny(f"model.prefix_form={form}")
    batch = three_tasks(model)
    found = seen(model, config, step(model, batch)).record["gradients"]
    assert set(found) == {"prefix", "adapter"}
    for kind, of in found.items():
        rows = one_by_one(model, batch, 0, kind)
        assert torch.tensor(of["norms"]) == pytest.approx(rows.norm(dim=1).tolist(), rel=1e-4)
        assert torch.allclose(torch.tensor(of["cosines"]).double(), cosines(rows), atol=1e-5)
        assert cosines(rows).abs().min() < 0.9, "tasks that differ"


def test_micro_batches_and_site_limits_are_added_up_as_they_should_be():
    model, config = tiny()
    batch = three_tasks(model)
    halves = [
        batch._replace(loss_weights=batch.loss_weights * torch.tensor(part)) for part in ([1, 0, 1, 0], [0, 1, 0, 1])
    ]
    whole, parts = (seen(model, config, step(model, *batches)).record for batches in ([batch], halves))
    for kind in whole["gradients"]:
        assert torch.allclose(*(torch.tensor(r["gradients"][kind]["cosines"]) for r in (whole, parts)), atol=1e-5)
    few = Watch(model, most=1)
    with few.listening(batch):
        loss = model(batch).loss
    loss.backward()
    assert {len(part[0]) for part in few._gradients.values()} == {1}, "only the first site"
    rows = one_by_one(model, batch, 0, "adapter").norm(dim=1)
    assert bool((few.products()["adapter"].diagonal().sqrt() < rows).all())


def test_two_tasks_that_are_the_same_agree_in_everything_and_one_that_is_not_drawn_has_no_gradient():
    model, config = tiny('hypernet.conditions=["task"]')
    table = model.hypernet.conditions["task"].embedding.table.weight
    with torch.no_grad():
        table[2] = table[0]
    batch = tiny_batch(model.backbone.model)
    batch = batch._replace(
        **{name: getattr(batch, name)[[0, 1, 0, 1]] for name in ("input_ids", "attention_mask", "labels")}
    )
    batch = batch._replace(targets=(batch.labels.flatten() != -100).nonzero().squeeze(1))
    record = seen(model, config, step(model, batch)).record
    for kind in ("prefix", "adapter"):
        gradients, weights = record["gradients"][kind], record["weights"][kind]
        assert gradients["cosines"][0][2] == pytest.approx(1, abs=1e-5)
        assert weights["cosines"][0][2] == pytest.approx(1, abs=1e-5) and weights["cosines"][0][1] < 0.99
        assert gradients["norms"][1] is None and gradients["cosines"][1] == [None] * 3
        assert gradients["cosines"][0][1] is None
        assert weights["norms"][0] == pytest.approx(weights["norms"][2])
    assert record["hyper_embeddings"]["task"]["cosines"][0][2] == pytest.approx(1, abs=1e-5)


def test_tasks_that_want_the_opposite_conflict():
    model, config = tiny('hypernet.conditions=["task"]', 'modules.kinds=["adapter"]')
    with torch.no_grad():
        model.hypernet.conditions["task"].embedding.table.weight[:] = 1.0
    batch = three_tasks(model)
    for name in ("input_ids", "attention_mask", "labels"):
        batch = batch._replace(**{name: getattr(batch, name)[[0, 0, 0, 0]]})
    batch = batch._replace(
        targets=(batch.labels.flatten() != -100).nonzero().squeeze(1), loss_weights=torch.tensor([1.0, 0.0, -1.0, 0.5])
    )
    found = seen(model, config, step(model, batch))
    a, b, _ = found.record["gradients"]["adapter"]["cosines"]
    assert [a[1], a[2], b[2]] == pytest.approx([-1, 1, -1], abs=1e-5)
    assert found.scalars["gradient_conflict/adapter"] == pytest.approx(2 / 3)
    assert found.scalars["gradient_cosine/adapter"] == pytest.approx(-1 / 3, abs=1e-5)


def test_norms_and_cosines_of_generated_weights_are_those_of_what_a_forward_pass_is_given():
    model, config = tiny('modules.kinds=["prefix","adapter","lora"]')
    batch = three_tasks(model)
    found = seen(model, config, step(model, batch))
    with torch.no_grad():
        branch = model.hypernet(batch).branches[0]
    geometry = model.backbone.geometry
    assert found.record["layers"] == ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]
    adapter = torch.cat([part.flatten(2) for part in branch.adapter[:4]], -1)  # (S, T, n)
    layers = [(site.block.in_encoder, site.layer) for site in geometry.adapter_sites]
    assert layers == [(True, 0), (True, 1), (False, 0), (False, 1)]
    assert torch.allclose(torch.tensor(found.record["weights"]["adapter"]["norms"]).double(), adapter.norm(dim=-1).mT)
    own = cosines(adapter.transpose(0, 1).flatten(1))
    assert torch.allclose(torch.tensor(found.record["weights"]["adapter"]["cosines"]).double(), own, atol=1e-5)
    prefix = torch.cat([branch.prefix.keys.flatten(2), branch.prefix.values.flatten(2)], -1)
    cross = [i for i, site in enumerate(geometry.prefix_sites) if site.block == Block.DECODER_CROSS]
    expected = float(prefix[cross].norm(dim=-1).mean())
    assert found.scalars["weights/task/decoder_cross/prefix"] == pytest.approx(expected, rel=1e-5)
    query = torch.cat([part.flatten(2) for part in branch.lora[0]], -1)
    rows = torch.tensor(found.record["weights"]["query"]["norms"]).double()
    in_encoder = [i for i, site in enumerate(geometry.projections[0].sites) if site == geometry.projections[0].sites[0]]
    assert rows[:, 0].tolist() == pytest.approx(query[in_encoder[0]].norm(dim=-1).tolist(), rel=1e-5)
    numbers = found.numbers["generated/task/encoder_ffn/adapter"]
    assert {round(float(n), 5) for n in numbers} <= {round(float(n), 5) for n in adapter[:2].flatten()}
    assert "weights/image/encoder_ffn/adapter" in found.scalars
    assert not set(found.numbers) & set(found.scalars), "TensorBoard shows a name in one of its tabs only"


def test_the_parts_of_the_gradient_norm_add_up_to_it():
    model, config = tiny()
    watch = step(model, three_tasks(model))
    squares = {name: float(p.grad.square().sum()) for name, p in model.named_parameters()}
    scalars = seen(model, config, watch).scalars
    parts = {name.removeprefix("gradient_norm/"): v for name, v in scalars.items() if name.startswith("gradient_norm/")}
    assert sum(v**2 for v in parts.values()) == pytest.approx(sum(squares.values()), rel=1e-5)
    heads = sum(v for name, v in squares.items() if "controllers.image.0.heads.prefix" in name) ** 0.5
    assert parts["image_prefix_head"] == pytest.approx(heads, rel=1e-5)
    assert {"task_embeddings", "image_embeddings", "task_site_embeddings", "task_projector", "norms"} < set(parts)


def test_the_prefix_share_is_what_a_softmax_over_all_columns_gives_to_the_prefix():
    torch.manual_seed(0)
    query, key = torch.randn(3, 4, 5, 6), torch.randn(3, 2, 7, 6)  # grouped queries
    prefix = SitePrefix(torch.randn(2, 3, 12), torch.randn(2, 3, 12), torch.tensor([1, -1, 0]), torch.tensor(0.7))
    bias = torch.randn(3, 1, 5, 7)
    found = prefix_share(query, key, [prefix], bias, 0.4)
    for sample, condition in enumerate([1, -1, 0]):
        total = torch.zeros(5)
        for head in range(4 if condition >= 0 else 0):
            rows = prefix.keys[condition].view(3, 2, 6)[:, head // 2]
            prefixed = query[sample, head] @ rows.mT * 0.4 + 0.7
            real = query[sample, head] @ key[sample, head // 2].mT * 0.4 + bias[sample, 0]
            total = total + torch.cat([prefixed, real], -1).softmax(-1)[:, :3].sum(-1)
        assert torch.allclose(found[sample], total / 4, atol=1e-6)


@pytest.mark.parametrize("kind", ["marian", "t5", "llama"])
def test_padding_has_no_part_in_the_prefix_share_and_watching_changes_nothing(kind):
    model, _ = tiny('hypernet.conditions=["task"]', kind=kind)
    batch = three_tasks(model)
    with model.backbone.watched() as shares:
        watched = model(batch).loss
    assert torch.equal(model(batch).loss, watched)
    together = {place: share.clone() for place, share in shares.items()}
    assert set(together) == set(range(len(model.backbone.geometry.prefix_sites)))
    # where source and target are one sequence, a target's last token is a query only if longer ones are beside it
    for row in (0, 2) if kind == "llama" else range(4):
        with model.backbone.watched() as shares:
            model(pick(batch, row)._replace(images=torch.zeros(1, CELLS, CHANNELS).double()))
        for place, share in shares.items():
            assert float(share[0]) == pytest.approx(float(together[place][row]), abs=1e-6)
            assert 0 < float(share[0]) < 1
    watch = step(model, batch)
    _, of_all = watch.prefix_shares()["decoder_self"]
    own = [together[i] for i, s in enumerate(model.backbone.geometry.prefix_sites) if s.block == Block.DECODER_SELF]
    assert of_all == pytest.approx(float(torch.stack(own).mean()), abs=1e-6)


def test_a_watched_step_has_the_gradients_of_any_other_to_the_last_bit():
    model, config = tiny()
    batch = three_tasks(model)
    model(batch).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    seen(model, config, step(model, batch))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, plain[name]), name
    assert not model.hypernet._forward_hooks and model.backbone.slot.shares is None


@pytest.mark.parametrize(
    "overrides, gradients, weights, hyper",
    [
        (["hypernet.conditions=[]", "hypernet.parameters=task"], {"prefix", "adapter"}, {"prefix", "adapter"}, set()),
        (["hypernet.conditions=[]", "hypernet.parameters=shared"], set(), set(), set()),
        (['hypernet.conditions=["image"]'], set(), set(), set()),
        (["model.generation_budget_mb=0.0001"], set(), {"prefix", "adapter"}, {"task"}),
        (['modules.kinds=["lora"]', "hypernet.copies=2"], {"query", "value"}, {"query", "value"}, {"task"}),
        (["hypernet.rows=table", 'modules.kinds=["prefix"]', "modules.prefix_weighting=gate"], {"prefix"}, {"prefix"},
         {"task"}),
        (["hypernet.conditions=[]", "modules.kinds=[]", "model.train_backbone=true"], set(), set(), set()),
    ],
)  # fmt: skip
def test_what_does_not_apply_to_a_method_is_left_out(overrides, gradients, weights, hyper):
    model, config = tiny(*overrides)
    found = seen(model, config, step(model, three_tasks(model)))
    record: dict[str, Any] = found.record
    assert set(record.get("gradients", {})) == gradients
    assert set(record.get("weights", {})) == weights
    assert set(record.get("hyper_embeddings", {})) == hyper
    assert record["tasks"] == list(TASKS) and record["mixture"]["drawn"] == [0.25, 0.25, 0.5]
    if "hypernet.parameters=shared" in overrides:
        assert found.scalars["weights/free/encoder_ffn/adapter"] > 0
    assert all(len(of.labels) == len(of.points) for of in found.embeddings.values())
    if hyper:
        sites = len(model.backbone.geometry.sites)
        assert found.embeddings["task_hyper_embeddings"].points.shape == (3 * sites, 8)
        assert found.embeddings["task_embeddings"].labels == [("a",), ("b",), ("c",)]
