"""What only models without an encoder have: one sequence a sample, prompts padded on the left, tokenizers as published.

What holds for every family is in test_backbones.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS
from tiny import CELLS, pick, plain_logits, tiny_backbone, tiny_batch, tiny_hypernet, tiny_model, tiny_modules
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import hyperpelt_ds
from hyperpelt_ds.backbones import Backbone, load_backbone
from hyperpelt_ds.config import Config, ModelConfig, save
from hyperpelt_ds.contracts import Batch, Block, Sample, Site, Weights
from hyperpelt_ds.data.collate import Collator
from hyperpelt_ds.model import HyperPELT

KINDS = ("llama", "qwen2")
LINEARS = dict(query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj", output="self_attn.o_proj")
LINEARS |= dict(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")


def of_targets(backbone: Backbone, weights: Weights | None, batch: Batch) -> torch.Tensor:
    return backbone.forward(weights, batch.input_ids, batch.attention_mask, batch.labels, batch.targets)


def test_only_blocks_of_a_decoder_have_sites():
    blocks = [block.name.lower() for block in Block]
    backbone = tiny_backbone("llama", kinds=("prefix", "adapter", "lora"), adapter_blocks=blocks)
    geometry = backbone.geometry
    assert geometry.prefix_sites == (Site(Block.DECODER_SELF, 0), Site(Block.DECODER_SELF, 1))
    assert {site.block for site in geometry.adapter_sites} == {Block.DECODER_SELF, Block.DECODER_FFN}
    assert (geometry.prefix_size, geometry.model_size, geometry.norms) == (2 * 6, 16, 5)
    assert [(p.inputs, p.outputs) for p in geometry.projections] == [(16, 24), (16, 12)]  # query and value
    batch = tiny_batch(backbone.model)
    assert of_targets(backbone, tiny_hypernet(backbone, copies=2)(batch), batch).shape == (14, 50)


@pytest.mark.parametrize("field, kind, blocks", [
    ("prefix_blocks", "prefix", ("encoder_self", "decoder_cross")), ("adapter_blocks", "adapter", ("encoder_ffn",)),
])  # fmt: skip
def test_a_kind_of_module_that_has_no_site_is_named(field, kind, blocks):
    with pytest.raises(ValueError, match=rf"modules.{field}: a llama model has none of {', '.join(blocks)}"):
        tiny_backbone("llama", kinds=("prefix", "adapter"), **{field: blocks})
    tiny_backbone("llama", kinds=("adapter" if kind == "prefix" else "prefix",), **{field: blocks})


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_around_attention_and_deltas_of_every_projection_equal_changed_modules(kind, placement):
    settings: dict[str, Any] = dict(adapter_blocks=("decoder_self", "decoder_ffn"), adapter_placement=placement)
    backbone = tiny_backbone(kind, kinds=("adapter", "lora"), lora_targets=tuple(LINEARS), lora_alpha=0.5, **settings)
    batch = tiny_batch(backbone.model)
    weights = tiny_hypernet(backbone)(batch)
    actual, without = (of_targets(backbone, w, batch).split([5, 3, 5, 1]) for w in (weights, None))
    for row in range(4):
        plain = tiny_model(kind)
        used = [(branch, branch.rows[row]) for branch in weights.branches if branch.rows[row] >= 0]
        for number, name in enumerate(LINEARS.values()):
            for place, layer in enumerate(plain.model.layers):
                for branch, c in used:
                    delta = branch.lora[number].down[place, c] @ branch.lora[number].up[place, c]
                    layer.get_submodule(name).weight.data += delta.T.detach()
        for place, site in enumerate(backbone.geometry.adapter_sites):

            def beside(module, args, kwargs, output, place=place, used=used):
                total = output[0] if isinstance(output, tuple) else output
                x = total if placement == "sequential" else kwargs.get("hidden_states", *args)
                for branch, c in used:
                    down, down_bias, up, up_bias = (part[place, c] for part in branch.adapter[:4])
                    total = total + branch.adapter.scale[place] * (torch.relu(x @ down + down_bias) @ up + up_bias)
                return (total, *output[1:]) if isinstance(output, tuple) else total

            layer = plain.model.layers[site.layer]
            module = layer.self_attn if site.block == Block.DECODER_SELF else layer.mlp
            module.register_forward_hook(beside, with_kwargs=True)
        norms = (module for module in plain.modules() if "Norm" in type(module).__name__)
        for module, value in zip(norms, weights.norms, strict=True):
            module.weight.data = value.detach()
        expected = plain_logits(plain, pick(batch, row))[0]
        assert torch.allclose(actual[row], expected, atol=2e-4)
        assert not torch.allclose(without[row], expected, atol=1e-2)


def _with_image(plain: Any, weights: Weights, batch: Batch, row: int) -> tuple[torch.Tensor, int]:
    """The vectors of a sample as one sequence: its source, its image if it has one, its target; the target's place."""
    embed, image = plain.get_input_embeddings(), int(weights.tokens.rows[row])
    parts = [embed(batch.input_ids[row][batch.attention_mask[row].bool()])]
    parts += [weights.tokens.values[image]] if image >= 0 else []
    start = sum(map(len, parts))
    return torch.cat([*parts, embed(batch.labels[row][batch.labels[row] >= 0])]).unsqueeze(0), start


@pytest.mark.parametrize("kind", KINDS)
def test_image_tokens_stand_between_source_and_target(kind):
    backbone, plain = tiny_backbone(kind, kinds=("adapter",), train_norms=False), tiny_model(kind)
    batch = tiny_batch(plain)
    weights = tiny_hypernet(backbone, image_tokens=True)(batch)._replace(branches=())
    assert weights.tokens.values.shape == (2, CELLS, 16)
    actual, blind = (of_targets(backbone, w, batch).split([5, 3, 5, 1]) for w in (weights, None))
    for row in range(4):
        vectors, start = _with_image(plain, weights, batch, row)
        expected = plain(inputs_embeds=vectors).logits[0, start - 1 : -1]
        assert torch.allclose(actual[row], expected, atol=1e-4)
        assert torch.allclose(actual[row], blind[row], atol=1e-2) == (batch.image_rows[row] < 0)


@pytest.mark.parametrize("modules", [("prefix", "adapter"), ("adapter",)])  # with and without anything left to look at
@pytest.mark.parametrize("beams", [1, 3])
def test_prompts_padded_on_the_left_are_answered_as_alone_with_images_and_without(modules, beams):
    backbone = tiny_backbone("llama", kinds=modules)
    batch = tiny_batch(backbone.model)
    for images in (False, True):
        network = tiny_hypernet(backbone, image_tokens=images)
        together = backbone.generate(network(batch), batch.input_ids, batch.attention_mask, 6, beams)
        assert len({tuple(row) for row in together.tolist()}) > 1
        for row in range(4):
            alone = pick(batch, row)
            ids = backbone.generate(network(alone), alone.input_ids, alone.attention_mask, 6, beams)[0]
            assert together[row, : len(ids)].tolist() == ids.tolist()
            assert set(together[row, len(ids) :].tolist()) <= {2}  # an end pads where the model has no padding


def test_a_longer_padding_changes_nothing():
    backbone = tiny_backbone("qwen2")
    batch = tiny_batch(backbone.model)
    weights = tiny_hypernet(backbone, image_tokens=True)(batch)
    longer = batch._replace(
        input_ids=torch.cat([batch.input_ids, torch.full((4, 6), 7)], 1),
        attention_mask=torch.cat([batch.attention_mask, torch.zeros(4, 6, dtype=torch.long)], 1),
    )
    assert torch.allclose(of_targets(backbone, weights, longer), of_targets(backbone, weights, batch), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_full_fine_tuning_has_the_gradients_of_the_plain_model(kind):
    config = Config().override(["model.train_backbone=true", "modules.kinds=[]"])
    model = HyperPELT(config, Backbone(tiny_model(kind), None, tiny_modules(kinds=()), trainable=True), ("a", "b", "c"))
    plain = tiny_model(kind)
    batch = tiny_batch(plain)
    model(batch).loss.backward()
    losses = [
        torch.nn.functional.cross_entropy(plain_logits(plain, pick(batch, row))[0], pick(batch, row).labels[0])
        for row in range(4)
    ]
    torch.stack(losses).mean().backward()
    for (name, parameter), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None and parameter.grad.any(), name
        assert torch.allclose(parameter.grad, reference.grad, atol=1e-4), name


def save_causal(folder: Path, template: str = "<s> $A") -> Path:
    """A tiny Llama and a tokenizer like a published one: texts begin with <s>, nothing ends them, nothing pads."""
    tiny_model("llama").save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<s>", "<unk>", "</s>", *WORDS])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 2)])
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template, start", [("$A", []), ("<s> $A", [0]), ("$A </s>", []), ("<s> $A </s>", [0])])
def test_sources_begin_as_the_tokenizer_has_it_and_never_end(template, start, tmp_path):
    tokenizer = load_backbone(ModelConfig(backbone=str(save_causal(tmp_path, template)))).tokenizer
    assert tokenizer("a film")["input_ids"] == [*start, 3, 5]
    batch = Collator(tokenizer, ["a"], 8, 8, None, None)([Sample("1", "a", "a film", "the film")], {}, [1.0])
    assert batch.labels.tolist() == [[4, 5, 2]]


def test_answers_end_with_the_tokenizers_end_and_with_all_of_the_models(tmp_path):
    backbone = load_backbone(ModelConfig(backbone=str(save_causal(tmp_path))))
    assert backbone.tokenizer.pad_token_id == 2
    assert backbone.model.generation_config.eos_token_id == [2]
    model = tiny_model("llama", eos_token_id=[5, 6])
    settings = Backbone(model, backbone.tokenizer, tiny_modules()).model.generation_config
    assert (settings.eos_token_id, settings.pad_token_id, settings.suppress_tokens) == ([5, 6, 2], 5, None)


@pytest.mark.slow
def test_a_llama_without_a_pad_token_trains_and_answers(config, run_python, tmp_path):
    steps = ["train.steps=3", "train.eval_every=3", "vision.tokens=true", "model.activation_checkpointing=true"]
    run = config.override([f"model.backbone={save_causal(tmp_path / 'backbone')}", "train.learning_rate=0.05", *steps])
    save(run, tmp_path / "run.json")
    (tmp_path / "train.py").write_text(
        "from hyperpelt_ds import config\n"
        "from hyperpelt_ds.train import loop\n"
        f"loop.train(config.load('{tmp_path}/run.json'), 'ds_configs/zero2_cpu.json', '{tmp_path}/run')\n"
    )
    done = run_python("python", tmp_path / "train.py")
    assert done.returncode == 0, done.stderr[-4000:]
    predictor = hyperpelt_ds.load(tmp_path / "run")
    texts = ["the film is very good", "a dull story"]
    together = predictor.generate("movie_rating", texts, num_beams=2)
    assert together == [predictor.generate("movie_rating", [text], num_beams=2)[0] for text in texts]
    assert all(set(answer.split()) <= {*WORDS, "<unk>"} for answer in together) and any(together)
