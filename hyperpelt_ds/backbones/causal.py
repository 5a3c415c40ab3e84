"""How models without an encoder are run: a sample is one sequence, its source, its image's tokens, its target.

Real tokens are moved together, so that no position depends on how far a batch is padded: to the left end where logits
are computed, to the right end where generation goes on from the last one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hyperpelt_ds.backbones.family import Layout


def _with_labels(model: Any, sources: Tensor, mask: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    heard = labels[:, :-1]  # nothing follows the last one
    words = model.get_input_embeddings()(heard.clamp(min=0))
    real = torch.cat([mask.bool(), heard >= 0], dim=1)
    inputs = _moved(torch.cat([sources, words], dim=1), real, (~real).int())
    before = mask.sum(1) - 1 + torch.arange(len(mask), device=mask.device) * real.shape[1]
    return inputs, before.unsqueeze(1) + torch.arange(labels.shape[1], device=labels.device)


def _prompt(sources: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return _moved(sources, mask, mask)


def _moved(vectors: Tensor, real: Tensor, order: Tensor) -> dict[str, Tensor]:
    """What a model is called with: `vectors` (B, T, D) and their mask, sorted by `order` (B, T), otherwise as before.

    Positions follow from the mask, in transformers.
    """
    places = order.argsort(dim=1, stable=True)
    return {
        "inputs_embeds": vectors.gather(1, places.unsqueeze(2).expand_as(vectors)),
        "attention_mask": real.gather(1, places).long(),
    }


def _tokenizer(tokenizer: Any) -> Any:
    """Most published ones have no padding: an end will do, since masks tell. Some end every text, which would say that
    a source goes no further: that is switched off, and targets get their end where they are made."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokens = tokenizer("a")["input_ids"]
    if tokens[-1:] == [tokenizer.eos_token_id]:
        tokenizer.add_bos_token = tokens[0] == tokenizer.bos_token_id
        tokenizer.add_eos_token = False
    return tokenizer


LAYOUT = Layout(
    auto_class=AutoModelForCausalLM,
    with_labels=_with_labels,
    prompt=_prompt,
    tokenizer=_tokenizer,
    one_sequence=True,
)
