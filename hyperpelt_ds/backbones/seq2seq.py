"""How models with an encoder are run: it reads the source, and the decoder predicts the target."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from hyperpelt_ds.backbones.family import Layout


def _with_labels(model: Any, sources: Tensor, mask: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], None]:
    shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
    return {**_prompt(sources, mask), "decoder_input_ids": shifted}, None


def _prompt(sources: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"inputs_embeds": sources, "attention_mask": mask}


LAYOUT = Layout(
    auto_class=AutoModelForSeq2SeqLM,
    with_labels=_with_labels,
    prompt=_prompt,
    tokenizer=lambda tokenizer: tokenizer,
    one_sequence=False,
)
