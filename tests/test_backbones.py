"""The seam to transformers, held by every family alike."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import (
    KINDS,
    VOCABULARY,
    pick,
    plain_logits,
    tensors,
    tiny_backbone,
    tiny_batch,
    tiny_hypernet,
    tiny_model,
    tiny_modules,
)
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, AutoTokenizer, BertConfig, BertModel
from transformers.masking_utils import eager_mask

from hyperpelt_ds.backbones import Backbone, load_backbone
from hyperpelt_ds.backbones.attention import call_by_name
from hyperpelt_ds.backbones.families import family_of
from hyperpelt_ds.config import ModelConfig
from hyperpelt_ds.contracts import Weights
from hyperpelt_ds.kernels.prefix_attention import MERGED
from hyperpelt_ds.model import HyperPELT

pytestmark = pytest.mark.parametrize("kind", KINDS)


def detach(weights: Weights) -> Weights:
    def leaves(part):
        return part and type(part)(*(t if t is None else t.detach().clone().requires_grad_() for t in part))

    branches = tuple(b._replace(prefix=leaves(b.prefix), adapter=leaves(b.adapter)) for b in weights.branches)
    return Weights(branches, weights.norms.detach().clone().requires_grad_())


def run(backbone: Backbone, weights: Weights | None, batch) -> torch.Tensor:
    logits = backbone.forward(weights, batch.input_ids, batch.attention_mask, batch.labels)
    # without an encoder, padded labels have no place in a sequence: whatever stands there is left out
    return logits if backbone.model.config.is_encoder_decoder else logits * (batch.labels >= 0).unsqueeze(2)


def answers(backbone: Backbone, ids: torch.Tensor) -> torch.Tensor:
    """Generated ids without the one that decoders of encoders start from."""
    return ids[:, 1:] if backbone.model.config.is_encoder_decoder else ids


def test_without_weights_it_is_the_plain_model(kind):
    model = tiny_model(kind)
    batch = tiny_batch(model)
    expected = plain_logits(model, batch)
    assert torch.allclose(run(Backbone(model, None, tiny_modules()), None, batch), expected, atol=1e-5)


def test_all_zero_adapters_and_own_norms_change_nothing_at_all(kind):
    backbone = tiny_backbone(kind, kinds=("adapter",))
    batch = tiny_batch(backbone.model)
    network = tiny_hypernet(backbone)
    for controller in network.controllers.values():
        torch.nn.init.zeros_(controller[0].heads["adapter"].linear.weight)
    assert torch.equal(run(backbone, network(batch), batch), run(backbone, None, batch))


def _explicit(weights: Weights, sites: dict[int, int]):
    """Attention as the paper writes it: softmax(q [P; K]^T) [P; V], sample by sample, in float64."""

    def repeated(tensor, times):
        """(B, H', T, d) with every head `times` times: the queries that look at it."""
        return torch.cat([tensor[:, [head]] for head in range(tensor.shape[1]) for _ in range(times)], 1)

    def attention(module, query, key, value, attention_mask, scaling=None, position_bias=None, **_):
        site, rows = sites[id(module)], []
        heads, size = key.shape[1:4:2]
        key, value = (repeated(tensor, query.shape[1] // heads) for tensor in (key, value))
        for i in range(query.shape[0]):
            scores = query[i].double() @ key[i].double().mT * (1.0 if scaling is None else scaling)
            if position_bias is not None:
                scores = scores + position_bias[i if len(position_bias) > 1 else 0].double()
            if attention_mask is not None:
                scores = scores + attention_mask[i if len(attention_mask) > 1 else 0].double()
            values = value[i].double()
            for branch in weights.branches:
                if branch.rows[i] < 0:
                    continue
                own = (part[site, branch.rows[i]].double().view(1, -1, heads, size) for part in branch.prefix[:2])
                keys, added = (repeated(part.transpose(1, 2), query.shape[1] // heads)[0] for part in own)
                scale = 1.0 if scaling is None else scaling
                scores = torch.cat([query[i].double() @ keys.mT * scale, scores], dim=-1)
                values = torch.cat([added, values], dim=1)
            rows.append(scores.softmax(-1) @ values)
        return torch.stack(rows).transpose(1, 2).to(query.dtype), None

    return attention


def test_prefixes_equal_explicit_concatenation_sample_by_sample(kind):
    backbone, plain = tiny_backbone(kind, kinds=("prefix",), train_norms=False), tiny_model(kind)
    batch = tiny_batch(plain)
    weights = tiny_hypernet(backbone)(batch)
    attentions = [s.attention for s in family_of(plain.config.model_type, kind).sublayers(plain) if s.attention]
    sites = {id(module): number for number, module in enumerate(attentions)}
    AttentionInterface.register("explicit", _explicit(weights, sites))
    AttentionMaskInterface.register("explicit", eager_mask)
    call_by_name(plain, "explicit")
    expected = plain_logits(plain, batch)
    actual = run(backbone, weights, batch)
    assert torch.allclose(actual, expected, atol=1e-4)
    assert not torch.allclose(actual, run(backbone, None, batch), atol=1e-2)


def test_adapters_equal_the_formula_beside_every_feed_forward_block(kind):
    backbone, plain = tiny_backbone(kind, kinds=("adapter",), train_norms=False), tiny_model(kind)
    batch = tiny_batch(plain)
    weights = tiny_hypernet(backbone)(batch)
    blocks = [s for s in family_of(plain.config.model_type, kind).sublayers(plain) if s.attention is None]
    for number, (first, last) in enumerate((block.first, block.last) for block in blocks):
        seen = []

        def before(module, args, seen=seen):
            seen.append(args[0])

        def after(module, args, output, number=number, seen=seen):
            x, added = seen.pop(), torch.zeros_like(output)
            for branch in weights.branches:
                for i, row in enumerate(branch.rows.tolist()):
                    if row >= 0:
                        down, down_bias, up, up_bias, scale = (part[number] for part in branch.adapter[:5])
                        hidden = torch.relu(x[i] @ down[row] + down_bias[row])
                        added[i] += scale * (hidden @ up[row] + up_bias[row])
            return output + added

        first.register_forward_pre_hook(before)
        last.register_forward_hook(after)
    with torch.no_grad():
        expected = plain_logits(plain, batch)
        actual = run(backbone, weights, batch)
    assert torch.allclose(actual, expected, atol=1e-4)
    assert not torch.allclose(actual, run(backbone, None, batch), atol=1e-2)


def test_norms_of_the_bank_replace_the_models_own(kind):
    backbone, plain = tiny_backbone(kind), tiny_model(kind)
    batch = tiny_batch(plain)
    values = backbone.initial_norms + 0.3 * torch.randn_like(backbone.initial_norms)
    places = [
        (module, name)
        for module in family_of(plain.config.model_type, kind).norms(plain)
        for name in ("weight", "bias")
        if getattr(module, name, None) is not None
    ]
    assert len(places) == backbone.geometry.norms
    with torch.no_grad():
        for (module, name), value in zip(places, values, strict=True):
            getattr(module, name).copy_(value)
    expected = plain_logits(plain, batch)
    assert torch.allclose(run(backbone, Weights((), values), batch), expected, atol=1e-5)


def test_a_mixed_padded_batch_equals_its_samples_one_by_one(kind):
    backbone = tiny_backbone(kind)
    batch, network = tiny_batch(backbone.model), None
    network = tiny_hypernet(backbone)
    together = run(backbone, network(batch), batch)
    for row in range(len(batch.samples)):
        alone = pick(batch, row)
        weights = network(alone)
        if alone.image_rows[0] < 0:  # without its branch, not only with a masked one
            weights = weights._replace(branches=weights.branches[:1])
        expected = run(backbone, weights, alone)[0]
        assert torch.allclose(together[row, : len(expected)], expected, atol=1e-4)


def test_no_position_sees_its_future_and_unpadded_batches_are_causal_too(kind):
    backbone = tiny_backbone(kind)
    batch = tiny_batch(backbone.model)
    batch = batch._replace(labels=batch.labels.clamp(min=3), attention_mask=torch.ones_like(batch.attention_mask))
    weights = tiny_hypernet(backbone)(batch)
    changed = batch.labels.clone()
    changed[:, 3:] = (changed[:, 3:] + 5 - 3) % (VOCABULARY - 3) + 3
    before, after = run(backbone, weights, batch), run(backbone, weights, batch._replace(labels=changed))
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-6)  # logits at 3 predict the first changed label
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)


def test_gradients_reach_every_row_of_every_prefix_and_every_adapter(kind):
    backbone = tiny_backbone(kind)
    batch = tiny_batch(backbone.model)
    weights = detach(tiny_hypernet(backbone)(batch))
    run(backbone, weights, batch).logsumexp(-1).sum().backward()
    for branch in weights.branches:
        assert (branch.prefix.values.grad.abs().sum(-1) > 0).all()  # (S, C, P)
        assert (branch.prefix.keys.grad.abs().sum(-1) > 0).all()
        for name, tensor in list(branch.adapter._asdict().items())[:5]:
            assert (tensor.grad.view(len(tensor), -1).abs().sum(1) > 0).all(), name  # at every site
    assert (weights.norms.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("beams", [1, 3])
def test_cached_generation_equals_recomputing_every_prefix_of_the_output(kind, beams):
    backbone = tiny_backbone(kind)
    batch = tiny_batch(backbone.model)
    weights = tiny_hypernet(backbone)(batch)
    cached = backbone.generate(weights, batch.input_ids, batch.attention_mask, 6, beams)
    backbone.model.generation_config.use_cache = False
    ids, mask = batch.input_ids, batch.attention_mask
    if not backbone.model.config.is_encoder_decoder:  # published models go on from prompts padded on the left
        ids = [ids[row][mask[row].bool()] for row in range(4)]
        mask = [torch.ones_like(row) for row in ids]
        ids, mask = (pad_sequence(rows, batch_first=True, padding_side="left") for rows in (ids, mask))
    uncached = backbone.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=6, num_beams=beams, do_sample=False, use_cache=False
    )
    assert torch.equal(cached, uncached if backbone.model.config.is_encoder_decoder else uncached[:, ids.shape[1] :])
    if beams == 1:  # and greedy search is what teacher forcing predicts
        for row in range(4):
            tokens = answers(backbone, cached)[row]
            labels = tokens.unsqueeze(0).expand(4, -1).contiguous()
            logits = backbone.forward(weights, batch.input_ids, batch.attention_mask, labels)[row]
            end = next((i for i, t in enumerate(tokens) if t == backbone.model.config.eos_token_id), len(tokens) - 1)
            assert torch.equal(logits.argmax(-1)[: end + 1], tokens[: end + 1])


def test_beam_search_gives_each_sample_the_weights_of_its_own_condition(kind):
    backbone = tiny_backbone(kind)
    batch = tiny_batch(backbone.model)
    network = tiny_hypernet(backbone)
    together = backbone.generate(network(batch), batch.input_ids, batch.attention_mask, 6, 3)
    for row in range(4):
        alone = pick(batch, row)
        one = backbone.generate(network(alone), alone.input_ids, alone.attention_mask, 6, 3)[0]
        special = {backbone.model.config.pad_token_id, backbone.model.config.eos_token_id}
        assert [t for t in together[row].tolist() if t not in special] == [t for t in one.tolist() if t not in special]


def test_activation_checkpointing_changes_no_gradient(kind):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(kind)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        backbone = Backbone(model, None, tiny_modules())
        backbone.train()
        batch = tiny_batch(model)
        network = tiny_hypernet(backbone)
        run(backbone, network(batch), batch).logsumexp(-1).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        assert (gradient - gradients[1][name]).norm() < 1e-5 * gradient.norm(), name


def test_the_frozen_model_is_unchanged_by_training_steps(kind):
    backbone = tiny_backbone(kind)
    batch = tiny_batch(backbone.model)
    network = tiny_hypernet(backbone)
    before = backbone.fingerprint()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        run(backbone, network(batch), batch).logsumexp(-1).mean().backward()
        optimizer.step()
    assert backbone.fingerprint() == before
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not torch.equal(network.norms.values, backbone.initial_norms)


def test_bfloat16_stays_near_float32(kind):
    backbone = tiny_backbone(kind)
    batch = tiny_batch(backbone.model)
    weights = tiny_hypernet(backbone)(batch)
    expected = run(backbone, weights, batch)
    half = Backbone(tiny_model(kind).to(torch.bfloat16), None, tiny_modules())
    actual = run(half, weights, batch)
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() < 0.1 * expected.norm()  # bf16 keeps 8 bits; errors add over 2+2 layers


def test_dropout_is_the_models_own_unless_set(kind, tmp_path):
    model = tiny_model(kind, dropout=0.5)
    model.save_pretrained(tmp_path)
    _save_tokenizer(tmp_path)
    batch = tiny_batch(model)
    for dropout, changes in ((None, True), (0.0, False), (0.2, True)):
        backbone = load_backbone(ModelConfig(backbone=str(tmp_path), dropout=dropout))
        backbone.train()
        same = torch.equal(run(backbone, None, batch), run(backbone, None, batch))
        assert same != changes
        backbone.train(False)
        assert torch.equal(run(backbone, None, batch), run(backbone, None, batch))


def _save_tokenizer(folder) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w1", eos_token="w2").save_pretrained(folder)


def test_images_as_tokens_change_no_set_of_parameters_that_get_a_gradient(kind, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path)  # loading makes parameters of tables that are fixed in a new model
    _save_tokenizer(tmp_path)
    backbone = load_backbone(ModelConfig(backbone=str(tmp_path), train_backbone=True), tiny_modules(kinds=()))
    batch = tiny_batch(backbone.model)
    weights = tiny_hypernet(backbone, image_tokens=True)(batch)
    reached = []
    for tokens in (weights.tokens, None):  # with ZeRO-2, ranks whose sets differ reduce buckets that do not match
        backbone.model.zero_grad()
        run(backbone, weights._replace(tokens=tokens), batch).logsumexp(-1).sum().backward()
        reached.append({name for name, p in backbone.model.named_parameters() if p.grad is not None})
    assert reached[0] == reached[1] and len(reached[0]) > 10


def test_a_backbone_that_lacks_weights_or_its_padding_is_refused(kind, tmp_path):
    """They would be drawn at random, others in every process."""
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    _save_tokenizer(tmp_path)
    load_backbone(ModelConfig(backbone=str(tmp_path)))
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "layers.1" in name or "block.1" in name)
    save_file(
        {n: tensor for n, tensor in weights.items() if n != name}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"model.backbone: .* lacks the weights .*, which are never made up"):
        load_backbone(ModelConfig(backbone=str(tmp_path)))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"has {VOCABULARY} embeddings, and its tokenizer pads with number 5[01]"):
        load_backbone(ModelConfig(backbone=str(tmp_path)))


def test_layers_share_what_is_added_to_scores_beside_prefixes(kind, monkeypatch):
    """On the way that dropout and GPUs take; else every layer keeps a copy for its backward pass."""
    monkeypatch.delitem(MERGED, "cpu")
    backbone = tiny_backbone(kind)
    batch = tiny_batch(backbone.model)
    weights = tiny_hypernet(backbone)(batch)
    weights = weights._replace(branches=tuple(b._replace(prefix=_without_offset(b.prefix)) for b in weights.branches))
    seen = []
    given = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, mask, *a, **more: seen.append(mask) or given(q, k, v, mask, *a, **more),
    )
    run(backbone, weights, batch)
    sites = len(backbone.geometry.prefix_sites)
    kinds = len({site.block for site in backbone.geometry.prefix_sites})
    masks = {mask.data_ptr() for mask in seen if mask is not None}
    assert len(seen) == sites and len(masks) <= kinds < sites


def _without_offset(prefix):
    return prefix and prefix._replace(offset=None)


def test_a_batchs_weights_are_let_go_before_the_next_are_made(kind):
    backbone = tiny_backbone(kind)
    batch = tiny_batch(backbone.model)
    hypernet = tiny_hypernet(backbone)
    run(backbone, hypernet(batch), batch)
    model = HyperPELT.__new__(HyperPELT)
    assert backbone.slot._prefixes
    stopped = RuntimeError("the next weights are being made")

    def make(*_):
        assert not backbone.slot._prefixes
        raise stopped

    torch.nn.Module.__init__(model)
    model.__dict__.update(backbone=backbone, prefix_rows=None, generation_budget=None)
    model.hypernet = torch.nn.Identity()
    model.hypernet.forward = make
    for call in (lambda: model.forward(batch), lambda: model.generate(batch, 2)):
        backbone.slot.set((), None)
        run(backbone, hypernet(batch), batch)
        with pytest.raises(RuntimeError, match="are being made"):
            call()


def test_two_backbones_in_one_process_do_not_share_weights(kind):
    one, two = tiny_backbone(kind), tiny_backbone(kind)
    batch = tiny_batch(one.model)
    expected = run(two, None, batch), plain_logits(two.model, batch)
    run(one, tiny_hypernet(one)(batch), batch)
    assert torch.equal(plain_logits(two.model, batch), expected[1])
    assert torch.equal(run(two, None, batch), expected[0])
    assert torch.allclose(*expected, atol=1e-5)


def test_an_unsupported_model_type_lists_what_is_supported(kind, tmp_path):
    BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path
    )
    with pytest.raises(
        ValueError, match=r"model.backbone: .*'bert'; supported are bart, llama, marian, mistral, mt5, qwen2, t5"
    ):
        load_backbone(ModelConfig(backbone=str(tmp_path)))
    with pytest.raises(ValueError, match=r"cannot load '.*nowhere'"):
        load_backbone(ModelConfig(backbone=str(tmp_path / "nowhere")))


def test_generated_tensors_are_all_used(kind):
    backbone = tiny_backbone(kind)
    batch = tiny_batch(backbone.model)
    weights = tiny_hypernet(backbone)(batch)
    for tensor in tensors(weights):
        tensor.retain_grad()
    run(backbone, weights, batch).logsumexp(-1).sum().backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in tensors(weights))


def test_the_published_models_own_generation_settings_are_left_out(kind):
    plain = tiny_backbone(kind)
    model = tiny_model(kind)
    model.generation_config.update(min_length=5, no_repeat_ngram_size=1, forced_bos_token_id=7, length_penalty=9.0)
    batch = tiny_batch(model)
    outputs = []
    for backbone in (plain, Backbone(model, None, tiny_modules())):
        weights = tiny_hypernet(backbone)(batch)
        outputs.append(backbone.generate(weights, batch.input_ids, batch.attention_mask, 6, 2))
    assert torch.equal(*outputs)
    with pytest.raises(ValueError, match="num_beams must be at least 1"):
        plain.generate(None, batch.input_ids, batch.attention_mask, 6, 0)
