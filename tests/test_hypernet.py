"""The hypernetwork: what it emits, from what, at which size."""

from __future__ import annotations

import pytest
import torch
from tiny import CELLS, pick, tiny_backbone, tiny_batch, tiny_hypernet

from hyperpelt_ds.backbones import Backbone, random_model
from hyperpelt_ds.config import Config, HypernetConfig
from hyperpelt_ds.contracts import Block, Conditions
from hyperpelt_ds.hypernet.hypernetwork import HyperNetwork, Projector
from hyperpelt_ds.model import HyperPELT


@pytest.fixture
def backbone() -> Backbone:
    return tiny_backbone("t5")


T5_BASE = dict(num_layers=12, d_model=768, d_kv=64, d_ff=3072, num_heads=12, vocab_size=32128, decoder_start_token_id=0)


def trainables(*overrides: str, tasks: int = 8) -> int:
    """Trainable parameters of a configuration on T5-base, counted on the meta device."""
    config = Config().override(overrides)
    with torch.device("meta"):
        backbone = Backbone(random_model("t5", **T5_BASE), None, config.modules)
        model = HyperPELT(config, backbone, [f"task{i}" for i in range(tasks)])
    return sum(parameter.numel() for parameter in model.parameters())


def test_weights_have_the_shapes_of_the_contract(backbone):
    batch = tiny_batch(backbone.model)
    weights = tiny_hypernet(backbone)(batch)
    attention, ffn, size, model = 6, 4, backbone.geometry.prefix_size, backbone.geometry.model_size
    for branch, rows in zip(weights.branches, (3, CELLS), strict=True):
        assert branch.prefix.keys.shape == branch.prefix.values.shape == (attention, 2, rows, size)
        shapes = [tuple(tensor.shape) for tensor in branch.adapter[:5]]
        assert shapes == [(ffn, 2, model, 4), (ffn, 2, 4), (ffn, 2, 4, model), (ffn, 2, model), (ffn,)]
    assert torch.equal(weights.branches[0].rows, batch.task_rows)
    assert torch.equal(weights.branches[1].rows, batch.image_rows)
    assert torch.equal(weights.norms, backbone.initial_norms)


def test_each_site_and_condition_equals_the_paper_equations_done_one_by_one(backbone):
    network = tiny_hypernet(backbone)
    batch = tiny_batch(backbone.model)
    weights = network(batch)
    (controller,), (positions,) = network.controllers["task"], network.sites["task"]
    projector, heads = controller.projector, controller.heads
    joint = torch.cat([projector.condition.weight, projector.layer.weight, projector.block.weight], 1)
    sites = backbone.geometry.sites
    for s, site in enumerate(sites):
        for c, task in enumerate(batch.tasks.tolist()):
            parts = [
                network.conditions["task"].embedding.table.weight[task],
                positions.layer.table.weight[site.layer],
                positions.block.table.weight[int(site.block)],
            ]
            rows = torch.cat([part.view(3, -1) for part in parts], 1)  # (P, 3 d)
            hyper = projector.norm(projector.rest[0](torch.relu(rows @ joint.T + projector.condition.bias)))
            if site.block.is_attention:
                keys, values = heads["prefix"].linear(hyper).chunk(2, -1)
                assert torch.allclose(weights.branches[0].prefix.keys[s, c], keys, atol=1e-5)
                assert torch.allclose(weights.branches[0].prefix.values[s, c], values, atol=1e-5)
            else:
                f = s - len(backbone.geometry.prefix_sites)
                flat = heads["adapter"].linear(hyper.mean(0))
                made = [part[f, c].flatten() for part in weights.branches[0].adapter[:4]]
                assert torch.allclose(torch.cat(made), flat, atol=1e-5)


def test_different_tasks_images_layers_and_blocks_get_different_weights(backbone):
    weights = tiny_hypernet(backbone)(tiny_batch(backbone.model))
    for branch in weights.branches:
        for tensor in (branch.prefix.keys, branch.prefix.values, branch.adapter.down, branch.adapter.up):
            flat = tensor.flatten(2).flatten(0, 1)  # (S x C, ...)
            distances = torch.cdist(flat, flat) + 1e9 * torch.eye(len(flat))
            assert distances.min() > 1e-3


def test_a_condition_is_generated_alike_alone_and_among_others(backbone):
    network, batch = tiny_hypernet(backbone), tiny_batch(backbone.model)
    together = network(batch)
    for row in range(4):
        alone = network(pick(batch, row))
        for one, all_of_them in zip(alone.branches, together.branches, strict=True):
            index = int(all_of_them.rows[row])
            if index >= 0:
                for part, fields in (("prefix", 2), ("adapter", 4)):
                    pairs = zip(getattr(one, part)[:fields], getattr(all_of_them, part)[:fields], strict=True)
                    assert all(torch.allclose(a[:, 0], b[:, index], atol=1e-6) for a, b in pairs)


def test_visual_rows_can_share_the_task_branchs_layer_and_block_embeddings():
    backbone = tiny_backbone("t5", prefix_length=CELLS)
    shared = tiny_hypernet(backbone, visual_embeddings="shared")
    own = tiny_hypernet(backbone, visual_embeddings="own")
    rows = 2 + len(Block)
    count = [sum(p.numel() for p in network.parameters()) for network in (own, shared)]
    assert count[0] - count[1] == rows * CELLS * 64
    assert shared(tiny_batch(backbone.model)).branches[1].prefix.keys.shape[2] == CELLS


def test_t5_base_counts_follow_the_formula():
    # method: P_emb + P_proj + P_prefix + P_adapter + P_scale + P_LN, with a task embedding for each of 8 tasks
    rows, d, h, e, tasks, mid, model = 49, 64, 128, 64, 8, 16, 768
    embeddings = rows * d * (tasks + 12 + 5)
    projector = 3 * d * h + h + h * e + e + 2 * e  # with its layer norm
    prefix = (e + 1) * 2 * model
    adapter = (e + 1) * 2 * model * mid + (e + 1) * (model + mid)
    expected = embeddings + projector + prefix + adapter + 24 + 62 * model
    assert trainables() == expected == 1_907_368


def test_the_projector_starts_like_one_linear_over_the_concatenation():
    torch.manual_seed(0)
    projector = Projector(HypernetConfig())
    bound = (3 * 64) ** -0.5
    for module in (projector.condition, projector.layer, projector.block):
        assert 0.9 * bound < module.weight.abs().max() <= bound


def test_a_scaled_hyper_embedding_starts_alike_and_moves_generated_weights_less_far(backbone):
    batch = tiny_batch(backbone.model)
    made, moved = [], []
    for scale in (1.0, 0.25):
        torch.manual_seed(3)
        config = HypernetConfig(conditions=("task",), hyper_scale=scale)
        network = HyperNetwork(
            config, backbone.modules, backbone.geometry, Conditions(3, None, None, None), backbone.initial_norms
        )
        linear = network.controllers["task"][0].heads["prefix"].linear
        before = network(batch).branches[0].prefix.keys
        with torch.no_grad():
            linear.weight += 0.01 * linear.weight.sign()  # as far as AdamW's first step goes, in every entry
        made.append(before)
        moved.append(network(batch).branches[0].prefix.keys - before)
    assert torch.allclose(made[0], made[1], atol=1e-6)
    assert torch.allclose(moved[1], 0.25 * moved[0], atol=1e-6)
