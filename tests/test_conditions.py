"""What generated weights are made from: every source of conditions, and every knob between it and the weights.

The reference walks site by site and condition by condition through plain matrix products on the network's parameters.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import CELLS, CHANNELS, VOCABULARY, pick, tensors, tiny_backbone, tiny_batch, tiny_hypernet, tiny_modules
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from hyperpelt_ds.backbones import Backbone, sentence_vectors
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Batch, Site, Weights
from hyperpelt_ds.hypernet import HyperNetwork
from hyperpelt_ds.model import HyperPELT

WORDS = ("is", "the", "film", "good", "or", "bad", "what", "colour", "shape")
ALL_KINDS = ("prefix", "adapter", "lora")


def condition_rows(network: HyperNetwork, name: str, batch: Batch, c: int) -> Tensor:
    """The rows (P, d) of condition number `c` of a source."""
    source: Any = network.conditions[name]
    if name == "task":
        entry = source.embedding.table.weight[batch.tasks[c]]
        places = source.embedding.places
        return entry.view(source.rows, -1) if places is None else entry + places.weight
    if name == "image":
        cells = batch.images[c] @ source.project.weight.T + source.project.bias
        return cells if source.places is None else cells + source.places.weight
    vector = source.vectors[batch.tasks[c]]
    return (vector @ source.project.weight.T + source.project.bias) + source.places.weight


def site_rows(embedding: Any, site: Site) -> tuple[Tensor, Tensor]:
    """The layer and block rows of a site, each (P or 1, d)."""
    blocks = sorted({other.block for other in embedding.sites})
    layer = embedding.layer.table.weight[site.layer].view(embedding.layer.rows, -1)
    return layer, embedding.block.table.weight[blocks.index(site.block)].view(embedding.block.rows, -1)


def hyper_rows(projector: Any, condition: Tensor, layer: Tensor, block: Tensor) -> Tensor:
    """Linear, ReLU, linear, ..., norm of the concatenation [z; l; b]: (P, E)."""
    rows = len(condition)
    hidden = torch.cat([condition, layer.expand(rows, -1), block.expand(rows, -1)], 1)
    joint = torch.cat([projector.condition.weight, projector.layer.weight, projector.block.weight], 1)
    hidden = hidden @ joint.T + projector.condition.bias
    for linear in projector.rest:
        hidden = linear(hidden.clamp(min=0))
    if isinstance(projector.norm, nn.LayerNorm):
        mean, variance = hidden.mean(-1, keepdim=True), hidden.var(-1, keepdim=True, unbiased=False)
        hidden = (hidden - mean) / (variance + 1e-6).sqrt() * projector.norm.weight + projector.norm.bias
    return hidden


def check(network: HyperNetwork, backbone: Backbone, batch: Batch, weights: Weights) -> None:
    """Every tensor of every branch, site and condition equals the walk-through."""
    geometry = backbone.geometry
    stacked = len(network.controllers[network.branch_names[0]]) == 2
    for name, branch in zip(network.branch_names, weights.branches, strict=True):
        count = len(batch.images) if name == "image" else len(batch.tasks)
        where = "image" if name == "image" and "image" in network.sites else "task"
        for site, c in itertools.product(geometry.sites, range(count)):
            stack = int(not site.block.in_encoder) if stacked else 0
            controller: Any = network.controllers[name][stack]
            embedding = network.sites[where][stack]
            hyper = hyper_rows(
                controller.projector, condition_rows(network, name, batch, c), *site_rows(embedding, site)
            )

            def made(kind: str, rows: Tensor, controller: Any = controller) -> Tensor:
                linear = controller.heads[kind].linear
                return rows @ linear.weight.T + linear.bias

            pairs = []
            if site in geometry.prefix_sites:
                s = geometry.prefix_sites.index(site)
                pairs.append(
                    (torch.cat([branch.prefix.keys[s, c], branch.prefix.values[s, c]], 1), made("prefix", hyper))
                )
            if site in geometry.adapter_sites:
                s, a = geometry.adapter_sites.index(site), branch.adapter
                parts = [
                    part[s, c] for part in (a.down, a.down_bias, a.up, a.up_bias, a.gain, a.shift) if part is not None
                ]
                pairs.append((torch.cat([part.flatten() for part in parts]), made("adapter", hyper.mean(0))))
            for target, delta in zip(geometry.projections, branch.lora or (), strict=True):
                if site in target.sites:
                    s, scale = target.sites.index(site), backbone.modules.lora_alpha / backbone.modules.lora_rank
                    flat = torch.cat([delta.down[s, c].flatten(), delta.up[s, c].flatten() / scale])
                    pairs.append((flat, made(target.name, hyper.mean(0))))
            for actual, expected in pairs:
                assert actual.shape == expected.shape
                assert torch.allclose(actual, expected, atol=1e-4)


SETTINGS: dict[str, dict[str, Any]] = {
    "as in the paper": {},
    "row table": dict(rows="table"),
    "projector of one linear": dict(projector_depth=1),
    "projector of three": dict(projector_depth=3),
    "no projector norm": dict(projector_norm=False),
    "one hypernetwork a stack": dict(copies=2),
    "shared visual embeddings": dict(visual_embeddings="shared"),
    "all at once": dict(rows="table", projector_depth=3, projector_norm=False, copies=2, visual_embeddings="shared"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_site_and_condition_equals_the_walk_through(name):
    backbone = tiny_backbone("t5", kinds=ALL_KINDS, prefix_length=CELLS, adapter_norm=True)
    network = tiny_hypernet(backbone, conditions=("task", "image", "description"), hidden_size=24, **SETTINGS[name])
    batch = tiny_batch(backbone.model)
    with torch.no_grad():
        check(network, backbone, batch, network(batch))


@pytest.mark.parametrize("rows", ["expanded", "table"])
def test_row_tables_cost_one_vector_a_row_instead_of_one_a_row_and_entry(rows):
    backbone = tiny_backbone("t5")  # P = 3, two layers, five kinds of block
    network = tiny_hypernet(backbone, rows=rows, embedding_size=10)
    tables = [*network.conditions.values(), *network.sites.children()]
    count = sum(p.numel() for table in tables for p in table.parameters())
    projection = CHANNELS * 10 + 10
    if rows == "expanded":
        assert count == 10 * (3 * (3 + 2 + 5) + CELLS * (2 + 5)) + projection
    else:
        assert count == 10 * ((3 + 3) + 2 * (2 + 5) + CELLS) + projection
    shapes = [tuple(branch.prefix.keys.shape) for branch in network(tiny_batch(backbone.model)).branches]
    assert shapes == [(6, 2, 3, 12), (6, 2, CELLS, 12)]


@pytest.mark.parametrize("rows", ["expanded", "table"])
def test_rows_of_a_prefix_differ_and_so_do_cells_that_look_alike(rows):
    backbone = tiny_backbone("t5", kinds=("prefix",))
    network = tiny_hypernet(backbone, rows=rows, conditions=("task", "image", "description"))
    batch = tiny_batch(backbone.model)
    alike = batch._replace(images=batch.images[:, :1].expand(-1, CELLS, -1))
    for branch in network(alike).branches:
        keys = branch.prefix.keys.flatten(0, 1)
        distances = torch.cdist(keys, keys) + 1e9 * torch.eye(keys.shape[1])
        assert distances.min() > 1e-3


@pytest.mark.parametrize("depth, extra", [(1, 0), (2, 24 * 64 + 64), (3, 24 * 64 + 64 + 24 * 24 + 24)])
def test_the_projector_has_as_many_linear_maps_as_asked_for(depth, extra):
    backbone = tiny_backbone("t5")
    for norm in (True, False):
        network = tiny_hypernet(backbone, projector_depth=depth, hidden_size=24, projector_norm=norm)
        first = 24 if depth > 1 else 64
        expected = 3 * 64 * first + first + extra + 2 * 64 * norm
        assert sum(p.numel() for p in network.controllers["task"][0].projector.parameters()) == expected


# One hypernetwork for each stack


def encoder_and_decoder(backbone: Backbone, weights: Weights) -> tuple[Tensor, Tensor]:
    """All numbers that go to each stack."""
    geometry, parts = backbone.geometry, ([], [])
    for branch in weights.branches:
        kinds = [(branch.prefix, geometry.prefix_sites), (branch.adapter, geometry.adapter_sites)]
        kinds += [(d, p.sites) for d, p in zip(branch.lora or (), geometry.projections, strict=True)]
        for kind, sites in kinds:
            for tensor in kind or ():
                for s, site in enumerate(sites if tensor is not None else ()):
                    parts[not site.block.in_encoder].append(tensor[s].flatten())
    return torch.cat(parts[0]), torch.cat(parts[1])


def test_each_stack_depends_on_its_own_copy_alone_and_both_on_the_tasks():
    backbone = tiny_backbone("bart", kinds=ALL_KINDS, prefix_weighting="gate", adapter_norm=True)
    batch = tiny_batch(backbone.model)
    network = tiny_hypernet(backbone, copies=2)

    def changed(part: nn.Module) -> list[bool]:
        before = encoder_and_decoder(backbone, network(batch))
        kept = copy.deepcopy(part.state_dict())
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.add_(0.1)
        after = encoder_and_decoder(backbone, network(batch))
        part.load_state_dict(kept)
        return [not torch.equal(one, two) for one, two in zip(before, after, strict=True)]

    for name in ("task", "image"):
        assert [len(network.controllers[name]), len(network.sites[name])] == [2, 2]
        for stack in (0, 1):
            own = [stack == 0, stack == 1]
            assert changed(network.controllers[name][stack]) == changed(network.sites[name][stack]) == own
    assert changed(network.conditions["task"]) == changed(network.conditions["image"]) == [True, True]


@pytest.mark.parametrize(
    "modules, copies",
    [
        (dict(kinds=("prefix", "adapter"), prefix_blocks=("decoder_cross",), adapter_blocks=("encoder_ffn",)), 2),
        (dict(kinds=("prefix", "lora"), prefix_blocks=("encoder_self",)), 2),
        (dict(kinds=("prefix",), prefix_blocks=("decoder_self", "decoder_cross")), 1),
        (dict(kinds=("adapter",), adapter_blocks=("encoder_ffn", "encoder_self")), 1),
    ],
)
def test_a_stack_may_lack_a_kind_of_module_or_all_of_them(modules, copies):
    backbone = tiny_backbone("t5", **modules)
    network = tiny_hypernet(backbone, copies=2)
    batch = tiny_batch(backbone.model)
    assert len(network.controllers["task"]) == copies
    weights = network(batch)
    if copies == 2:
        with torch.no_grad():
            check(network, backbone, batch, weights)
    backbone.forward(weights, batch.input_ids, batch.attention_mask, batch.labels).logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_shared_visual_embeddings_are_the_tasks_own_row_for_row():
    backbone = tiny_backbone("t5", prefix_length=CELLS)
    batch = tiny_batch(backbone.model)
    for visual, together in (("shared", True), ("own", False)):
        network = tiny_hypernet(backbone, visual_embeddings=visual)
        before = network(batch).branches[1].prefix.keys
        with torch.no_grad():
            network.sites["task"][0].layer.table.weight.add_(torch.randn(2, CELLS * 64))
        assert torch.equal(network(batch).branches[1].prefix.keys, before) != together


# Sources of conditions


def combinations(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(names, n + 1) for n in range(len(names)))


def hyperpelt(conditions: tuple[str, ...], *overrides: str, **modules: Any) -> HyperPELT:
    """A tiny model of some conditions, every trainable of which matters."""
    settings = ["vision.encoder=resnet18", f"vision.cells={CELLS}", f"vision.channels={CHANNELS}"]
    settings += [f"hypernet.conditions={','.join(conditions)}", "hypernet.head_std=0.1", "hypernet.embedding_size=8"]
    if "description" in conditions:
        settings.append("hypernet.sentence_encoder=any")
    config = dataclasses.replace(Config().override([*settings, *overrides]), modules=tiny_modules(**modules))
    torch.manual_seed(6)
    backbone = tiny_backbone("t5", **modules)
    return HyperPELT(config, backbone, ("a", "b", "c"), torch.randn(3, 6) if "description" in conditions else None)


@pytest.mark.parametrize("conditions", combinations(("task", "image", "description")))
def test_every_combination_of_conditions_makes_its_branches_and_trains_all_of_them(conditions):
    model = hyperpelt(conditions, adapter_start="normal", kinds=ALL_KINDS)
    batch = tiny_batch(model.backbone.model)
    blind = batch._replace(
        images=torch.zeros_like(batch.images[:1]),
        image_rows=torch.full((4,), -1),
        samples=tuple(sample._replace(image=None) for sample in batch.samples),
    )
    assert model.hypernet.branch_names == conditions
    for name, branch in zip(conditions, model.hypernet(batch).branches, strict=True):
        assert torch.equal(branch.rows, batch.image_rows if name == "image" else batch.task_rows)
    for step in (batch, blind):
        model.zero_grad()
        model(step).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        for name in conditions:
            idle = name == "image" and step is blind
            touched = [p.grad.any() for p in model.hypernet.controllers[name].parameters()]
            assert not any(touched) if idle else all(touched)


def test_only_tasks_or_only_images_reach_a_model_that_has_only_them():
    for conditions, by_task, by_image in ((("task",), True, False), (("image",), False, True)):
        model = hyperpelt(conditions, adapter_start="normal").eval()
        batch = tiny_batch(model.backbone.model)
        losses = model(batch).sample_losses
        other_tasks = model(batch._replace(tasks=torch.tensor([1, 1]))).sample_losses
        other_images = model(batch._replace(images=batch.images.flip(0))).sample_losses
        assert [bool(x) for x in (losses - other_tasks).abs() > 1e-5] == [by_task] * 4
        assert [bool(x) for x in (losses - other_images).abs() > 1e-5] == [False] + [by_image] * 3


@pytest.mark.parametrize("settings", [{}, dict(rows="table", copies=2)])
def test_weights_of_a_condition_are_the_same_alone_and_among_others(settings):
    backbone = tiny_backbone("t5", kinds=ALL_KINDS)
    network = tiny_hypernet(backbone, conditions=("task", "image", "description"), image_tokens=True, **settings)
    batch = tiny_batch(backbone.model)
    together = network(batch)

    def of(part: Any, c: int) -> list[Tensor]:
        kinds = [part.prefix[:2], part.adapter[:4], *part.lora]
        return [tensor[:, c] for kind in kinds for tensor in kind]

    for row in range(4):
        alone = network(pick(batch, row))
        for one, many in zip(alone.branches, together.branches, strict=True):
            if many.rows[row] >= 0:
                for a, b in zip(of(one, 0), of(many, int(many.rows[row])), strict=True):
                    assert torch.allclose(a, b, atol=1e-5)
        if batch.image_rows[row] >= 0:
            expected = together.tokens.values[batch.image_rows[row]]
            assert torch.allclose(alone.tokens.values[0], expected, atol=1e-5)


# Descriptions


def test_described_tasks_differ_through_their_vectors_alone():
    model = hyperpelt(("description",), adapter_start="normal").eval()
    batch = tiny_batch(model.backbone.model)
    source: Any = model.hypernet.conditions["description"]
    losses = model(batch).sample_losses
    source.describe(source.vectors[[2, 1, 0]])  # the batch's tasks are 0 and 2
    swapped = model(batch._replace(tasks=batch.tasks.flip(0))).sample_losses
    assert torch.allclose(losses, swapped, atol=1e-6)
    assert (model(batch).sample_losses - losses).abs().min() > 1e-5
    source.describe(source.vectors[[0, 0, 0]])
    keys = model.hypernet(batch).branches[0].prefix.keys
    assert torch.allclose(keys[:, 0], keys[:, 1], atol=1e-5)


def test_further_tasks_can_be_described_without_touching_those_trained():
    model = hyperpelt(("description",), adapter_start="normal").eval()
    batch = tiny_batch(model.backbone.model)
    source: Any = model.hypernet.conditions["description"]
    source.describe(torch.randn(40, 6))
    batch = batch._replace(tasks=torch.arange(40))  # of so many, scaling twice would change a few
    further = batch._replace(tasks=torch.tensor([40, 41]))
    before, names = tensors(model.hypernet(batch)), set(model.state_dict())
    new = torch.randn(2, 6)
    source.extend(new)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(model.hypernet(batch)), strict=True))
    keys = model.hypernet(further).branches[0].prefix.keys
    assert (keys[:, 0] - keys[:, 1]).abs().max() > 1e-2
    source.describe(torch.cat([torch.randn(40, 6), new]))
    assert torch.equal(model.hypernet(further).branches[0].prefix.keys, keys)
    assert set(model.state_dict()) == names


def test_description_vectors_are_scaled_and_are_neither_trained_nor_saved():
    model = hyperpelt(("description",))
    source: Any = model.hypernet.conditions["description"]
    given = torch.randn(4, 6) * torch.tensor([[1e-3], [1.0], [5.0], [100.0]])
    source.describe(given)
    assert torch.allclose(source.vectors.pow(2).mean(1), torch.ones(4), atol=1e-5)
    assert torch.allclose(F.cosine_similarity(source.vectors, given), torch.ones(4), atol=1e-5)
    assert not any("vectors" in name for name in model.state_dict())
    assert not any(parameter.shape == source.vectors.shape for parameter in model.parameters())


@pytest.fixture(scope="module")
def sentence_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT with a whole-word tokenizer."""
    folder = tmp_path_factory.mktemp("sentences")
    torch.manual_seed(0)
    sizes = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=VOCABULARY, initializer_range=0.5, **sizes)).save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


def test_a_sentences_vector_is_the_mean_of_its_tokens_states_whatever_stands_beside_it(sentence_encoder):
    model = BertModel.from_pretrained(sentence_encoder).eval()
    sentences = {"is the film good": [2, 3, 4, 5], "what colour": [8, 9], "is the film good or bad": [2, 3, 4, 5, 6, 7]}
    together = sentence_vectors(str(sentence_encoder), list(sentences))
    assert together.shape == (3, 12) and together.dtype == torch.float32 and not together.requires_grad
    for row, (sentence, ids) in enumerate(sentences.items()):
        expected = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert torch.allclose(together[row], expected, atol=1e-5)
        assert torch.allclose(sentence_vectors(str(sentence_encoder), [sentence])[0], expected, atol=1e-5)
    distances = torch.cdist(together, together) + torch.eye(3)
    assert distances.min() > 1e-2


def test_a_sentence_encoder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"hypernet.sentence_encoder: cannot load '.*nowhere'"):
        sentence_vectors(str(tmp_path / "nowhere"), ["a"])


# The control over layers


def test_shifted_layers_make_other_weights_and_give_back_the_same_ones_even_after_an_error():
    backbone = tiny_backbone("t5", kinds=ALL_KINDS)
    batch = tiny_batch(backbone.model)
    for settings in ({}, dict(copies=2, conditions=("task", "description"))):
        network = tiny_hypernet(backbone, **settings)
        before = tensors(network(batch))
        with network.shifted_layers():
            shifted = network(batch)
        for branch, own in zip(shifted.branches, network(batch).branches, strict=True):
            sites = backbone.geometry.prefix_sites
            for s, site in enumerate(sites):  # two layers: each gets what is made for the other
                other = sites.index(Site(site.block, 1 - site.layer))
                assert torch.equal(branch.prefix.keys[s], own.prefix.keys[other])
                assert not torch.equal(branch.prefix.keys[s], own.prefix.keys[s])
        with pytest.raises(KeyError), network.shifted_layers(3):
            assert not torch.equal(tensors(network(batch))[0], before[0])
            raise KeyError
        assert all(torch.equal(a, b) for a, b in zip(before, tensors(network(batch)), strict=True))
