"""A frozen sequence-to-sequence model with places for generated weights.

With `attention.py` this is the only code that touches transformers' modules. It does not know where weights come
from, what a task is, or how training works; a family's file tells it where things are.
"""

from __future__ import annotations

import hashlib
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from hyperpelt_ds.backbones import attention, bart, t5
from hyperpelt_ds.backbones.family import Family
from hyperpelt_ds.backbones.slot import Slot
from hyperpelt_ds.config import ModelConfig
from hyperpelt_ds.contracts import Geometry, Weights
from hyperpelt_ds.kernels import adapter

FAMILIES = (bart.FAMILY, t5.FAMILY)


class Backbone:
    """The frozen model of a run. Deliberately no nn.Module: the engine must not find its parameters.

    `activation` is that of generated adapters (the backbone's own is the model's business).
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase | None, activation: str = "relu"):
        self.model, self.tokenizer = model, tokenizer
        self.slot = Slot()
        family = family_of(model.config.model_type, str(model.config.name_or_path))
        model.requires_grad_(False).eval()
        model.generation_config = _plain_generation(model.config)
        model.set_attn_implementation(attention.NAME)
        attentions, ffns = list(family.attentions(model)), list(family.ffns(model))
        for number, (_, module) in enumerate(attentions):
            attention.attach(module, self.slot, number)
        for number, (_, first, last) in enumerate(ffns):
            _attach_adapter(first, last, self.slot, number, activation)
        self._targets: Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._keep_targets)
        self._norms = [
            (m, n) for m in family.norms(model) for n in ("weight", "bias") if getattr(m, n, None) is not None
        ]
        self.initial_norms = torch.stack([getattr(module, name).detach() for module, name in self._norms])
        for module, name in self._norms:
            delattr(module, name)  # a Parameter cannot be replaced by the bank's tensor; a plain attribute can
        self._set_norms(None)
        self.geometry = Geometry(
            sites=tuple(site for site, *_ in attentions + ffns),
            prefix_size=family.prefix_size(model),
            model_size=model.config.d_model,
            norms=len(self._norms),
        )

    @property
    def positions(self) -> int | None:
        """The longest sequence it can take; None if there is no limit (T5)."""
        limit: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return limit

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def to(self, device: torch.device) -> Backbone:
        self.model.to(device)
        self.initial_norms = self.initial_norms.to(device)
        self._set_norms(None)
        return self

    def train(self, mode: bool = True) -> None:
        """Switches dropout and activation checkpointing on or off; nothing becomes trainable."""
        self.model.train(mode)

    def forward(
        self,
        weights: Weights | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T', vocabulary) of the labels (B, T'), given what comes before them.

        input_ids, attention_mask (B, T); labels padded with -100. With `targets` (N,), places in labels.flatten(),
        only their logits are made: (N, vocabulary). Without weights this is the plain model.
        """
        self._load(weights)
        decoder_input_ids = self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        self._targets = targets
        try:
            output = self.model(
                input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids, use_cache=False
            )
        finally:
            self._targets = None
        return cast(Tensor, output.logits)

    @torch.no_grad()
    def generate(
        self,
        weights: Weights | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int,
        num_beams: int = 1,
    ) -> Tensor:
        """Token ids (B, at most 1 + max_new_tokens), greedy or with beams, under one set of weights throughout.

        The model's own generation settings (length penalties, forced or forbidden tokens) are left out: they
        belong to what the model was published for, not to the tasks trained here.
        """
        if num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {num_beams}")
        self._load(weights)
        generated = self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
        )
        return cast(Tensor, generated)

    def decode(self, ids: Tensor) -> list[str]:
        """Texts of generated ids (B, T), special tokens left out."""
        assert self.tokenizer is not None
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def fingerprint(self) -> str:
        """sha256 over the names, types and bytes of the frozen weights, the initial norms included."""
        digest = hashlib.sha256()
        for name, tensor in [*self.model.state_dict().items(), ("initial_norms", self.initial_norms)]:
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _load(self, weights: Weights | None) -> None:
        def cast_all(parts: Any) -> Any:
            return None if parts is None else type(parts)(*(tensor.to(self.dtype) for tensor in parts))

        branches = weights.branches if weights is not None else ()
        self.slot.set(tuple(b._replace(prefix=cast_all(b.prefix), adapter=cast_all(b.adapter)) for b in branches))
        self._set_norms(weights.norms if weights is not None else None)

    def _keep_targets(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Spares the projection to the vocabulary for padding: about half of all places where targets are short."""
        return None if self._targets is None else (args[0].flatten(0, 1)[self._targets],)

    def _set_norms(self, values: Tensor | None) -> None:
        values = self.initial_norms if values is None else values.to(self.initial_norms.dtype)
        for (module, name), value in zip(self._norms, values.unbind(), strict=True):
            setattr(module, name, value)


def _plain_generation(config: Any) -> GenerationConfig:
    """Only the special tokens: transformers fills every setting that a call leaves open from the model's own."""
    pad, end = config.pad_token_id, config.eos_token_id
    return GenerationConfig(
        pad_token_id=pad,
        eos_token_id=end,
        decoder_start_token_id=config.decoder_start_token_id,
        suppress_tokens=[pad] if pad != end else None,  # published Marian models forbid it too: it has a likely logit
    )


def family_of(model_type: str, where: str) -> Family:
    """The family of a transformers model type; a ValueError lists what is supported."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    supported = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise ValueError(f"model.backbone: {where!r} has model type {model_type!r}; supported are {supported}")


def load_backbone(config: ModelConfig, activation: str = "relu") -> Backbone:
    """Loads a local folder or hub id, frozen, with dropout, type and checkpointing as configured.

    Raises ValueError for an unsupported model type, and one that names the path where nothing can be loaded.
    """
    where = config.backbone
    if not where:
        raise ValueError("model.backbone: give a local folder or a hub id")
    try:
        model_config = AutoConfig.from_pretrained(where)
        family = family_of(model_config.model_type, where)
        if config.dropout is not None:
            for name in family.dropout_fields:
                setattr(model_config, name, config.dropout)
        for name in family.no_dropout_fields:
            setattr(model_config, name, 0.0)
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForSeq2SeqLM.from_pretrained(where, config=model_config, dtype=getattr(torch, config.dtype))
    except OSError as error:
        raise ValueError(f"model.backbone: cannot load {where!r}: {str(error).splitlines()[0]}") from error
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Backbone(model, tokenizer, activation)


def random_model(model_type: str, **fields: Any) -> Any:
    """An untrained model of a supported type with the given configuration fields: for benchmarks and tests."""
    family_of(model_type, model_type)
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, **fields))


def _attach_adapter(first: nn.Module, last: nn.Module, slot: Slot, site: int, activation: str) -> None:
    """Adds the adapters of feed-forward site `site` beside the block that starts at `first` and ends at `last`."""
    inputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[:] = [args[0]]

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs.pop()
        adapters = slot.adapters(site, x.shape[0])
        return adapter(x, output, adapters, activation) if adapters else output

    first.register_forward_pre_hook(before)
    last.register_forward_hook(after)
