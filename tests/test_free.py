"""Modules from plain parameters: what a hypernetwork is compared with."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny import CELLS, CHANNELS, pick, tensors, tiny_backbone, tiny_batch, tiny_hypernet
from torch import Tensor

from hyperpelt_ds.backbones import Backbone
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Batch, Block, Branch, Weights
from hyperpelt_ds.hypernet import HyperNetwork
from hyperpelt_ds.model import HyperPELT

ALL_KINDS = ("prefix", "adapter", "lora")
TASKS = 3


def network_of(parameters: str, backbone: Backbone, **settings: Any) -> HyperNetwork:
    """Only plain parameters, unless `settings` names conditions."""
    return tiny_hypernet(backbone, TASKS, **{"parameters": parameters, "conditions": (), **settings})


def of_condition(branch: Branch, c: int) -> list[Tensor]:
    """Everything of a branch that is made for its condition number `c`."""
    kinds = [branch.prefix[:2], branch.adapter[:4], *(branch.lora or ())]
    return [tensor[:, c] for kind in kinds for tensor in kind]


def logits(backbone: Backbone, weights: Weights | None, batch: Batch) -> Tensor:
    with torch.no_grad():
        return backbone.forward(weights, batch.input_ids, batch.attention_mask, batch.labels)


def test_a_set_for_each_task_is_the_right_one_for_each_sample():
    backbone = tiny_backbone("t5", kinds=ALL_KINDS)
    batch = tiny_batch(backbone.model)  # tasks 0 and 2
    network = network_of("task", backbone)
    (branch,) = network(batch).branches
    assert network.branch_names == ("free",) and torch.equal(branch.rows, batch.task_rows)
    free = network.free
    for c, task in enumerate((0, 2)):
        stored = [free.prefix.keys, free.prefix.values]
        stored += [free.adapter.down, free.adapter.down_bias, free.adapter.up, free.adapter.up_bias]
        for kind in free.lora:
            stored += [kind.down, kind.up * (16 / 2)]
        for actual, parameter in zip(of_condition(branch, c), stored, strict=True):
            assert torch.equal(actual, parameter[:, task])
    before = logits(backbone, network(batch), batch)
    with torch.no_grad():
        free.prefix.values[:, 2] += 1
        free.adapter.up[:, 1] += 1
    changed = (logits(backbone, network(batch), batch) - before).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == [False, False, True, True]  # the task not in the batch changes nothing


def test_gradients_reach_the_sets_of_the_tasks_in_the_batch_alone():
    backbone = tiny_backbone("bart", kinds=ALL_KINDS)
    batch = tiny_batch(backbone.model)
    network = network_of("task", backbone)
    backbone.forward(network(batch), batch.input_ids, batch.attention_mask, batch.labels).logsumexp(-1).sum().backward()
    for name, parameter in network.free.named_parameters():
        if parameter.ndim > 1:
            assert parameter.grad.transpose(0, 1).flatten(1).any(1).tolist() == [True, False, True], name
        else:
            assert parameter.grad.all(), name


def test_one_shared_set_ignores_the_task():
    backbone = tiny_backbone("t5", kinds=ALL_KINDS)
    batch = tiny_batch(backbone.model)
    for prefix_mlp in (0, 5):
        network = network_of("shared", backbone, prefix_mlp=prefix_mlp)
        (branch,) = network(batch).branches
        assert branch.rows.tolist() == [0] * 4 and branch.prefix.keys.shape[1] == 1
        other = batch._replace(tasks=torch.tensor([1, 2]), task_rows=torch.tensor([1, 1, 0, 0]))
        expected = logits(backbone, network(batch), batch)
        assert torch.equal(logits(backbone, network(other), other), expected)
        assert not torch.allclose(expected, logits(backbone, None, batch), atol=1e-2)
        for row in range(4):
            alone = pick(batch, row)
            actual = logits(backbone, network(alone), alone)[0]
            assert torch.allclose(actual, expected[row, : len(actual)], atol=1e-4)


@pytest.mark.parametrize("blocks", [("encoder_self", "decoder_self", "decoder_cross"), ("decoder_cross",)])
def test_a_reparametrised_prefix_equals_its_mlp_in_the_order_of_the_sites(blocks):
    backbone = tiny_backbone("t5", kinds=("prefix",), prefix_blocks=blocks)
    batch = tiny_batch(backbone.model)
    network = network_of("shared", backbone, prefix_mlp=5)
    prefix = network(batch).branches[0].prefix
    made = network.free.prefix
    width = backbone.geometry.prefix_size
    for number, block in enumerate(sorted(Block[name.upper()] for name in blocks)):
        first, _, second = made.makers[number]
        hidden = torch.tanh(made.tables[number].weight @ first.weight.T + first.bias)
        rows = hidden @ second.weight.T + second.bias  # (P, layers x (key, value) x K)
        assert rows.shape == (3, 2 * 2 * width) and hidden.shape == (3, 5)
        for s, site in enumerate(backbone.geometry.prefix_sites):
            if site.block == block:
                start = 2 * width * site.layer
                assert torch.allclose(prefix.keys[s, 0], rows[:, start : start + width], atol=1e-6)
                assert torch.allclose(prefix.values[s, 0], rows[:, start + width : start + 2 * width], atol=1e-6)
    keys = prefix.keys[:, 0].flatten(0, 1)
    assert (torch.cdist(keys, keys) + torch.eye(len(keys))).min() > 1e-3  # no two rows of any two sites are alike


def test_parameter_counts_are_those_of_the_methods_they_stand_for():
    def count(parameters: str, prefix_mlp: int = 0, **modules: Any) -> int:
        backbone = tiny_backbone("t5", train_norms=False, **modules)
        return sum(p.numel() for p in network_of(parameters, backbone, prefix_mlp=prefix_mlp).parameters())

    d, k, p, r, m = 16, 12, 3, 4, 5  # model size, prefix width, prefix rows, bottleneck, hidden size of the MLP
    prefix, adapter, lora = 6 * 2 * p * k, 4 * (2 * d * r + d + r), 6 * 2 * (d * 2 + 2 * k)
    assert count("shared", kinds=("prefix",)) == prefix
    assert count("task", kinds=("prefix",)) == TASKS * prefix
    assert count("shared", m, kinds=("prefix",)) == 3 * (p * d + d * m + m + m * 2 * 2 * k + 2 * 2 * k)
    assert count("shared", kinds=("adapter",)) == adapter + 4
    assert count("task", kinds=("adapter",), adapter_scale="fixed") == TASKS * adapter
    assert count("task", kinds=("adapter",), adapter_scale="fixed", adapter_norm=True) == TASKS * (adapter + 4 * 2 * d)
    assert count("task", kinds=("lora",)) == TASKS * lora
    assert count("shared", kinds=ALL_KINDS) == prefix + adapter + 4 + lora


def test_plain_parameters_start_as_their_authors_start_them():
    backbone = tiny_backbone("t5", kinds=ALL_KINDS, bottleneck=8, lora_rank=8)
    model = hyperpelt("task", backbone)
    free = model.hypernet.free
    assert free.prefix.keys.detach().std() == pytest.approx(0.02, rel=0.1)
    for down, up in ((kind.down.detach(), kind.up) for kind in (free.adapter, *free.lora)):
        bound = 16**-0.5  # kaiming_uniform(a=sqrt(5)) over 16 inputs
        assert 0.95 * bound < down.abs().max() <= bound and down.std() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not up.any()
    assert not free.adapter.down_bias.any() and not free.adapter.up_bias.any()


def hyperpelt(parameters: str, backbone: Backbone, *overrides: str) -> HyperPELT:
    config = Config().override(
        [
            "vision.encoder=resnet18",
            f"vision.cells={CELLS}",
            f"vision.channels={CHANNELS}",
            f"hypernet.parameters={parameters}",
            "hypernet.conditions=[]",
            "hypernet.head_std=0.2",
            *overrides,
        ]
    )
    torch.manual_seed(8)
    return HyperPELT(dataclasses.replace(config, modules=backbone.modules), backbone, ("a", "b", "c"))


def test_plain_task_weights_and_generated_image_weights_add_up_in_one_run():
    backbone = tiny_backbone("bart", kinds=ALL_KINDS)
    batch = tiny_batch(backbone.model)
    network = network_of("task", backbone, conditions=("image",))
    weights = network(batch)
    assert network.branch_names == ("image", "free")
    assert [branch.rows.tolist() for branch in weights.branches] == [[-1, 0, 0, 1], [0, 0, 1, 1]]
    together = logits(backbone, weights, batch)
    for kept in (0, 1):
        alone = logits(backbone, weights._replace(branches=(weights.branches[kept],)), batch)
        differs = (together - alone).abs().amax((1, 2)) > 1e-3
        assert differs.tolist() == ([True] * 4 if kept == 0 else [False, True, True, True])


@pytest.mark.parametrize("parameters", ["task", "shared"])
def test_a_baseline_sees_images_as_tokens(parameters):
    backbone = tiny_backbone("t5", kinds=("prefix", "adapter"))
    model = hyperpelt(parameters, backbone, "vision.tokens=true").eval()
    batch = tiny_batch(backbone.model)
    before = model(batch).sample_losses
    changed = (model(batch._replace(images=batch.images.flip(0))).sample_losses - before).abs() > 1e-5
    assert changed.tolist() == [False, True, True, True]
    assert len(tensors(model.hypernet(batch))) == 2 + 5 + 1 + 1  # prefix, adapter with its factor, norms, tokens
    model(batch).loss.backward()
    assert model.hypernet.image_tokens.project.weight.grad.any()


@pytest.mark.parametrize("settings", [dict(parameters="task"), dict(parameters="shared", prefix_mlp=5)])
def test_generation_with_plain_parameters_and_beams_gives_each_sample_its_own_set(settings):
    backbone = tiny_backbone("t5", kinds=ALL_KINDS, lora_alpha=1.0)
    batch = tiny_batch(backbone.model)
    network = network_of(backbone=backbone, image_tokens=True, **settings)
    together = backbone.generate(network(batch), batch.input_ids, batch.attention_mask, 6, 3)
    special = {backbone.model.config.pad_token_id, backbone.model.config.eos_token_id}
    for row in range(4):
        alone = pick(batch, row)
        ids = backbone.generate(network(alone), alone.input_ids, alone.attention_mask, 6, 3)[0]
        assert [t for t in together[row].tolist() if t not in special] == [t for t in ids.tolist() if t not in special]


def test_only_a_set_for_each_task_belongs_to_tasks():
    backbone = tiny_backbone("t5", kinds=ALL_KINDS, adapter_norm=True)
    network = network_of("task", backbone)
    parameters = dict(network.named_parameters())
    assert {parameters[name].shape[dim] for name, dim in network.per_task.items()} == {TASKS}
    others = set(parameters) - set(network.per_task)
    assert others == {"norms.values", "free.adapter.scale.values"}
    assert network_of("shared", backbone).per_task == {}
