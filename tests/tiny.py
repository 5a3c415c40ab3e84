"""Tiny real models and batches for tests: random weights, real transformers classes, no files."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence

from hyperpelt_ds.backbones import Backbone
from hyperpelt_ds.config import HypernetConfig, ModulesConfig
from hyperpelt_ds.contracts import Batch, Conditions, Sample, Weights
from hyperpelt_ds.hypernet import HyperNetwork
from hyperpelt_ds.hypernet.free import FreeAdapter, FreeLowRank
from hyperpelt_ds.hypernet.heads import Generator

VOCABULARY, CELLS, CHANNELS = 50, 5, 7
KINDS = ("bart", "marian", "t5", "t5v1.1", "mt5", "llama", "qwen2", "mistral")


def tiny_model(kind: str, dropout: float = 0.0, **extra: object) -> transformers.PreTrainedModel:
    """Two layers a stack, weights large enough that every part of the model matters to the output."""
    torch.manual_seed(0)
    if "t5" in kind:
        classes = (
            (transformers.MT5Config, transformers.MT5ForConditionalGeneration)
            if kind == "mt5"
            else (transformers.T5Config, transformers.T5ForConditionalGeneration)
        )
        settings = dict(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=6,  # heads x head size is 12, not d_model
            d_ff=32,
            num_layers=2,
            num_heads=2,
            dropout_rate=dropout,
            feed_forward_proj="relu" if kind == "t5" else "gated-gelu",
            tie_word_embeddings=kind == "t5",
            decoder_start_token_id=0,
        )
    elif kind in ("llama", "mistral", "qwen2"):
        name = kind.capitalize()
        classes = (getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM"))
        settings = dict(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attention_dropout=dropout,
            bos_token_id=0,
            eos_token_id=2,
            initializer_range=0.3,
        )
        if kind != "qwen2":
            settings["head_dim"] = 6  # heads x head size is 24, not hidden_size
        if kind == "mistral":
            settings["sliding_window"] = 4
    else:
        name = {"bart": "Bart", "marian": "Marian"}[kind]
        model_class = "MarianMTModel" if kind == "marian" else f"{name}ForConditionalGeneration"
        classes = (getattr(transformers, f"{name}Config"), getattr(transformers, model_class))
        settings = dict(
            vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
            dropout=dropout,
            attention_dropout=dropout,
            pad_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
            init_std=0.3,
        )
    return classes[1](classes[0](**{**settings, **extra})).eval()


def tiny_batch(model: transformers.PreTrainedModel, seed: int = 1) -> Batch:
    """Four samples, two tasks, two images (one sample without), ragged sources and targets, sorted by condition."""
    generator = torch.Generator().manual_seed(seed)
    pad = 0 if model.config.pad_token_id is None else model.config.pad_token_id  # published Llama models have none
    input_ids = torch.randint(3, VOCABULARY, (4, 7), generator=generator)
    mask = torch.ones_like(input_ids)
    labels = torch.randint(3, VOCABULARY, (4, 5), generator=generator)
    for row, (source, target) in enumerate([(7, 5), (4, 3), (6, 5), (2, 1)]):
        input_ids[row, source:], mask[row, source:], labels[row, target:] = pad, 0, -100
    names, images = ("a", "a", "b", "b"), (None, "x", "x", "y")
    return Batch(
        input_ids=input_ids,
        attention_mask=mask,
        labels=labels,
        targets=(labels.flatten() != -100).nonzero().squeeze(1),
        tasks=torch.tensor([0, 2]),
        task_rows=torch.tensor([0, 0, 1, 1]),
        images=torch.randn(2, CELLS, CHANNELS, generator=generator),
        image_rows=torch.tensor([-1, 0, 0, 1]),
        loss_weights=torch.full((4,), 0.25),
        samples=tuple(Sample(str(i), n, "", "", image=p) for i, (n, p) in enumerate(zip(names, images, strict=True))),
    )


MODULES = ModulesConfig(prefix_length=3, bottleneck=4, lora_rank=2)


def tiny_modules(**settings: object) -> ModulesConfig:
    """Small modules: three prefix rows, bottleneck 4, rank 2, and what `settings` says."""
    return dataclasses.replace(MODULES, **settings)


def tiny_backbone(kind: str, dropout: float = 0.0, **modules: object) -> Backbone:
    """A tiny model with places for small modules."""
    return Backbone(tiny_model(kind, dropout), None, tiny_modules(**modules))


def tiny_hypernet(backbone: Backbone, tasks: int = 3, image_tokens: bool = False, **settings: object) -> HyperNetwork:
    """A hypernetwork for the modules of `backbone`, whose every output is large enough to matter."""
    torch.manual_seed(2)
    config = HypernetConfig(**{"head_std": 0.2, **settings})
    said = torch.randn(tasks, 6) if "description" in config.conditions else None
    available = Conditions(tasks, CELLS, CHANNELS, said)
    network = HyperNetwork(config, backbone.modules, backbone.geometry, available, backbone.initial_norms, image_tokens)
    stir(network)
    return network


def stir(network: torch.nn.Module) -> None:
    """Replaces the weights that start at zero, so that every part has an effect."""
    for module in network.modules():
        if isinstance(module, Generator):
            torch.nn.init.normal_(module.weight, std=0.1)
        if isinstance(module, (FreeAdapter, FreeLowRank)):
            for parameter in module.parameters(recurse=False):
                torch.nn.init.normal_(parameter, std=0.3)


def pick(batch: Batch, row: int) -> Batch:
    """One sample of a batch, alone, without padding and with only the conditions it uses."""
    source, target = int(batch.attention_mask[row].sum()), int((batch.labels[row] != -100).sum())
    image = int(batch.image_rows[row]) if batch.image_rows is not None else -1
    return batch._replace(
        input_ids=batch.input_ids[row : row + 1, :source],
        attention_mask=batch.attention_mask[row : row + 1, :source],
        labels=batch.labels[row : row + 1, :target],
        targets=torch.arange(target),
        tasks=batch.tasks[batch.task_rows[row]].view(1),
        task_rows=torch.zeros(1, dtype=torch.long),
        images=batch.images[image].unsqueeze(0) if image >= 0 else torch.zeros(1, CELLS, CHANNELS),
        image_rows=torch.tensor([0 if image >= 0 else -1]),
        loss_weights=batch.loss_weights[row : row + 1],
        samples=batch.samples[row : row + 1],
    )


def plain_logits(model: transformers.PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits (B, T', vocabulary) of the labels by a plain model, called as its authors would.

    Without an encoder, a sample is one sequence; what predicts padded labels is then zero.
    """
    if model.config.is_encoder_decoder:
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).logits
    sources = [ids[mask.bool()] for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    targets = [labels[labels >= 0] for labels in batch.labels]
    whole = [torch.cat(pair) for pair in zip(sources, targets, strict=True)]
    ids, mask = (pad_sequence(rows, batch_first=True) for rows in (whole, [torch.ones_like(row) for row in whole]))
    logits = model(input_ids=ids, attention_mask=mask).logits
    said = [row[len(s) - 1 :][: len(t)] for row, s, t in zip(logits, sources, targets, strict=True)]
    missing = batch.labels.shape[1] - max(map(len, targets))
    return F.pad(pad_sequence(said, batch_first=True), (0, 0, 0, missing))


def tensors(weights: Weights) -> list[torch.Tensor]:
    """Every tensor of `weights` but the rows, the norms included."""

    def leaves(part: object) -> list[torch.Tensor]:
        if part is None or isinstance(part, torch.Tensor):
            return [] if part is None else [part]
        return [leaf for item in part for leaf in leaves(item)]

    tokens = [] if weights.tokens is None else [weights.tokens.values]
    return [*leaves([branch[1:] for branch in weights.branches]), *leaves(weights.norms), *tokens]
