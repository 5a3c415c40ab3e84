"""A frozen language model with places for generated weights.

With `hooks.py` and `attention.py` this is the only code that touches transformers' modules. It does not know where
weights come from, what a task is, or how training works; a family's file tells it where things are.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from hyperpelt_ds.backbones import attention, hooks
from hyperpelt_ds.backbones.families import family_of
from hyperpelt_ds.backbones.int8 import parts_of, quantize
from hyperpelt_ds.backbones.prefix_form import TOKEN_ALONE, Form
from hyperpelt_ds.backbones.ragged import ends_of
from hyperpelt_ds.backbones.sharded import Group, Shards, Sizes, groups_of
from hyperpelt_ds.backbones.slot import Slot
from hyperpelt_ds.config import ModulesConfig
from hyperpelt_ds.contracts import Branch, Unmade, Weights
from hyperpelt_ds.kernels.index import copied
from hyperpelt_ds.kernels.regenerate import made_type


class Backbone:
    """The frozen model of a run. Deliberately no nn.Module: the engine must not find its parameters.

    `modules` says what is put beside it and where. With `trainable` (full fine-tuning) its parameters stay as
    transformers made them, norms included, and the caller hands `model` to the engine.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        modules: ModulesConfig | None = None,
        trainable: bool = False,
        prefix_form: Form = "auto",
    ):
        self.prefix_form = prefix_form
        self.skips_padding: bool | None = None
        """Whether adapters leave out what is behind a sample's last token; None is where kernels then do less, on GPUs.
        A CPU would make it and multiply by 0: 1.05 to 1.3 times as long with half the tokens padding."""
        self.model, self.tokenizer, self.trainable = model, tokenizer, trainable
        self.modules = modules if modules is not None else ModulesConfig()
        self.slot = Slot()
        self._family = family_of(model.config.model_type, str(model.config.name_or_path))
        if not trainable:
            model.requires_grad_(False)
        model.eval()
        model.generation_config = _plain_generation(model.config, tokenizer)
        self.forbidden: list[int] = model.generation_config.suppress_tokens or []
        """Tokens that are never generated. Taken out of the settings: transformers looks through the whole vocabulary
        for them at every token (1.5 % of a decode on a CPU)."""
        model.generation_config.suppress_tokens = None
        attention.call_by_name(model)
        self.geometry = hooks.attach(model, self._family, self.modules, self.slot)
        self._places: Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._keep_places)
        positions = self._family.positions(model)
        if positions is not None:
            positions.register_forward_hook(self._leave_out_images)
        self._norms = [
            (m, n) for m in self._family.norms(model) for n in ("weight", "bias") if getattr(m, n, None) is not None
        ]
        self.initial_norms = torch.stack([getattr(module, name).detach() for module, name in self._norms])
        if trainable:
            self._norms = []
            self.initial_norms = self.initial_norms[:0]
        for module, name in self._norms:
            delattr(module, name)  # a Parameter cannot be replaced by the bank's tensor; a plain attribute can
        self._set_norms(None)
        self.geometry = dataclasses.replace(self.geometry, norms=len(self._norms))
        self.shards: Shards | None = None

    @property
    def positions(self) -> int | None:
        """The longest sequence it can take; None if there is no limit (T5)."""
        limit: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return limit

    @property
    def one_sequence(self) -> bool:
        """Whether source, image tokens and target share the model's positions (models without an encoder)."""
        return self._family.layout.one_sequence

    @property
    def overflows_in_float16(self) -> bool:
        """Whether activations of published models of this family leave the range of float16."""
        return self._family.overflows_in_float16

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def quantize(self) -> None:
        """Makes the linear maps of the blocks int8; before `shard`. ValueError without the package for it."""
        quantize(self._family.blocks(self.model))

    def shard(self) -> None:
        """Splits the frozen weights over the ranks of the process group: this rank keeps its share. All hold the same
        model, and from now on run it together. Layer norms, which the bank replaces, and buffers stay whole."""
        assert not self.trainable
        self.shards = Shards(self.groups, self.initial_norms.device)

    def own_pace(self) -> AbstractContextManager[None]:
        """To be entered by all ranks where they run the model without gradients, but not equally often or long.

        Within, they do nothing else together.
        """
        return nullcontext() if self.shards is None else self.shards.own_pace()

    @property
    def groups(self) -> list[Group]:
        """The frozen weights, as those are gathered together where they are split."""
        return groups_of(self.model, list(self._family.blocks(self.model)))

    @property
    def sizes(self) -> Sizes:
        """Bytes of the frozen weights; norms and buffers are never split."""
        rest = sum(tensor.nbytes for tensor in (self.initial_norms, *self.model.buffers()))
        return Sizes(tuple(group.bytes for group in self.groups), rest)

    def to(self, device: torch.device) -> Backbone:
        if self.shards is not None:
            self.shards.to(device)
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
        self._load(weights, input_ids.shape[1], labels.shape[1])
        sources, mask = self._sources(input_ids, attention_mask)
        inputs, places = self._family.layout.with_labels(self.model, sources, mask, labels)
        if targets is not None:
            places = targets if places is None else places.flatten()[targets]
        if labels.is_cuda if self.skips_padding is None else self.skips_padding:
            self.slot.ends = ends_of(inputs, labels, self.one_sequence)
        self._places = places
        try:
            with nullcontext() if self.shards is None else self.shards.saving():
                output = self.model(**inputs, use_cache=False)
        finally:
            self._places = None
        if self.slot.shares is not None:
            self._average(self.slot.shares, inputs["attention_mask"] != 0, labels >= 0)
        return cast(Tensor, output.logits)

    @contextmanager
    def watched(self) -> Iterator[dict[int, Tensor]]:
        """Within, a forward pass leaves here by prefix site what share of attention its prefixes got: for each sample
        (B,) the mean over heads and real queries."""
        self.slot.shares = {}
        try:
            yield self.slot.shares
        finally:
            self.slot.shares = None

    @torch.no_grad()
    def generate(
        self,
        weights: Weights | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int,
        num_beams: int = 1,
    ) -> Tensor:
        """Token ids of the answers (B, at most 1 + max_new_tokens), greedy or with beams, under one set of weights
        throughout. With an encoder, the first is the one that decoders start from.

        The model's own generation settings (length penalties, forced or forbidden tokens) are left out: they
        belong to what the model was published for, not to the tasks trained here.
        """
        if num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {num_beams}")
        self._load(weights, input_ids.shape[1], TOKEN_ALONE * num_beams)
        with self.own_pace():
            generated = self.model.generate(
                **self._family.layout.prompt(*self._sources(input_ids, attention_mask)),
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                logits_processor=LogitsProcessorList([_Without(self.forbidden)]),
            )
        self.slot.forget()
        return cast(Tensor, generated)

    def decode(self, ids: Tensor) -> list[str]:
        """Texts of generated ids (B, T), special tokens left out."""
        assert self.tokenizer is not None
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def fingerprint(self) -> str:
        """sha256 over the names, types and bytes of the frozen weights as they are held, the initial norms included.

        The same whether they are split or not; where they are, every rank calls it.
        """
        digest = hashlib.sha256()

        def add(name: str, weight: Tensor) -> None:
            for part, tensor in parts_of(weight)[0].items():
                digest.update(f"{name}{part}{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

        for name, weight in self.model.state_dict().items():
            module, _, own = name.rpartition(".")
            owner = self.model.get_submodule(module)
            if self.shards is not None and own in owner._parameters:
                weight = self.shards.weight(owner, own)
            add(name, weight)
        add("initial_norms", self.initial_norms)
        return digest.hexdigest()

    def _load(self, weights: Weights | None, source: int, target: int) -> None:
        """Puts `weights` in their places, for sources and targets (or parts of them) of so many tokens."""
        branches = weights.branches if weights is not None else ()
        tokens = weights.tokens if weights is not None else None
        source += tokens.values.shape[1] if tokens is not None else 0
        lengths = [source + target if self.one_sequence else source if site.block.in_encoder else target
                   for site in self.geometry.prefix_sites]  # fmt: skip
        made = made_type(self.initial_norms.device.type, self.dtype)  # adapters are the most of what is generated
        self.slot.set(
            tuple(
                Branch(b.rows, _cast(b.prefix, self.dtype), _cast(b.adapter, made), _cast(b.lora, self.dtype))
                for b in branches
            ),
            tokens._replace(values=tokens.values.to(self.dtype)) if tokens is not None else None,
            lengths,
            self.prefix_form,
        )
        self._set_norms(weights.norms if weights is not None else None)

    def _sources(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The sources' words (B, T) as vectors, their images' tokens after them (hidden from samples without an image),
        and the mask of both."""
        words = self._family.embed(self.model, input_ids)
        if self.shards is not None and torch.is_grad_enabled():
            # without it, which blocks a rank's backward pass runs through would hang on whether its batch has images
            words.requires_grad_()
        tokens = self.slot.tokens
        if tokens is None:
            return words, attention_mask
        images = copied(tokens.values, tokens.rows.clamp(min=0))
        has_image = (tokens.rows >= 0).to(attention_mask.dtype).unsqueeze(1).expand(images.shape[:2])
        return torch.cat([words, images], 1), torch.cat([attention_mask, has_image], 1)

    def _leave_out_images(self, module: nn.Module, args: Any, positions: Tensor) -> Tensor | None:
        """An image has no place in a text, so that it does not matter how long the longest of the batch is."""
        if self.slot.tokens is None:
            return None
        cells = self.slot.tokens.values.shape[1]
        return F.pad(positions[..., :-cells, :], (0, 0, 0, cells))

    def _keep_places(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Spares the projection to the vocabulary for what predicts nothing: about half of all places where targets
        are short, and the sources of models without an encoder."""
        return None if self._places is None else (args[0].flatten(0, 1)[self._places],)

    def _average(self, shares: dict[int, Tensor], sources: Tensor, targets: Tensor) -> None:
        """Shares of tokens (B, T) become those of samples (B,); `sources` and `targets` say which tokens are real."""
        for place, share in shares.items():
            in_source = self.one_sequence or self.geometry.prefix_sites[place].block.in_encoder
            real = (sources if in_source else targets).float()
            shares[place] = (share * real).sum(1) / real.sum(1).clamp(min=1)

    def _set_norms(self, values: Tensor | None) -> None:
        if not self._norms:
            return
        values = self.initial_norms if values is None else values.to(self.initial_norms.dtype)
        for (module, name), value in zip(self._norms, values.unbind(), strict=True):
            setattr(module, name, value)


class _Without(LogitsProcessor):
    """Keeps tokens from being generated."""

    def __init__(self, tokens: list[int]):
        self.tokens = tokens

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        for token in self.tokens:
            scores[:, token] = -torch.inf
        return scores


def _plain_generation(config: Any, tokenizer: PreTrainedTokenizerBase | None) -> GenerationConfig:
    """Only the special tokens: transformers fills every setting that a call leaves open from the model's own.

    An answer ends with what the model says, which may be several tokens, and with what the tokenizer says, with which
    targets end. Where the model has no padding, an end pads.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [*ends, tokenizer.eos_token_id if tokenizer is not None else None]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    pad = config.pad_token_id
    return GenerationConfig(
        pad_token_id=next(iter(ends), None) if pad is None else pad,
        eos_token_id=ends or None,
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
        # published Marian models forbid padding too: it has a likely logit
        suppress_tokens=None if pad is None or pad in ends else [pad],
    )


def _cast(part: Any, dtype: torch.dtype) -> Any:
    """The tensors of a module kind, or of a tuple of them, as `dtype`."""
    if isinstance(part, Unmade):
        return part._replace(scale=part.scale.to(dtype))  # the rest is made first, in its own type, and then cast
    if part is None or isinstance(part, Tensor):
        return part if part is None else part.to(dtype)
    parts = [_cast(item, dtype) for item in part]
    return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
