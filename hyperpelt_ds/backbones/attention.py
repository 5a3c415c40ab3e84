"""The attention function and mask function that transformers calls by name, for every family alike.

The mask function is registered under the same name on purpose: without it padding would silently be attended to,
and for an unpadded decoder the mask would be None with causality left to a flag, which a prefix breaks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from hyperpelt_ds.backbones.slot import Slot
from hyperpelt_ds.kernels.prefix_attention import prefix_attention, prefix_share, score_bias

NAME = "hyperpelt"


def attach(module: nn.Module, slot: Slot, place: int | None, sees_images: bool) -> None:
    """Makes `module`'s attention read the prefixes of prefix site number `place` from `slot`; None for no prefix.

    `sees_images` says that image tokens stand at the end of both its queries and its keys (the encoder's attention).
    """
    module.__dict__["hyperpelt_site"] = (slot, place, sees_images)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    slot, place, sees_images = module.__dict__["hyperpelt_site"]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    cells = slot.tokens.values.shape[1] if sees_images and slot.tokens is not None else 0
    prefixes = slot.prefixes(place, query.shape[0], query.shape[2]) if place is not None else []
    bias = _added(slot, attention_mask, position_bias, cells, query.dtype)
    if prefixes and slot.shares is not None:
        slot.shares[cast(int, place)] = prefix_share(query, key, prefixes, bias, scale)
    if prefixes and query.shape[2] == 1 and not torch.is_grad_enabled():
        key, value, columns, prefixes = slot.joined(cast(int, place), key, value, prefixes)
        if columns and bias is not None:
            bias = slot.once(_beside, bias, columns)
    output = prefix_attention(query, key, value, prefixes, None, bias, scale, dropout, slot.once)
    return output.transpose(1, 2).contiguous(), None


def _added(slot: Slot, mask: Tensor | None, bias: Tensor | None, cells: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to scores: made once for all layers that are called with the same mask and bias, unless it has a
    gradient (a checkpointed layer that runs again must save as much as before)."""
    if bias is not None and bias.requires_grad:
        return _scores(mask, bias, cells, dtype)
    added: Tensor | None = slot.once(_scores, mask, bias, cells, dtype)
    return added


def _scores(mask: Tensor | None, bias: Tensor | None, cells: int, dtype: torch.dtype) -> Tensor | None:
    if bias is not None and cells:
        bias = _between_words(bias, cells)
    return score_bias(mask, bias, dtype)


def _beside(bias: Tensor, columns: int) -> Tensor:
    """What is added to scores, with nothing added to those of `columns` prefix rows that now stand before."""
    return F.pad(bias, (columns, 0))


def _between_words(bias: Tensor, cells: int) -> Tensor:
    """A relative position bias (1, H, T, T) that is 0 for pairs with an image token: an image has no place in a text
    (VL-Adapter). The last `cells` positions are images."""
    words = bias.shape[-1] - cells
    return F.pad(bias[..., :words, :words], (0, cells, 0, cells))


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """A bool mask, True where a query may look; always built, never skipped."""
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def call_by_name(model: PreTrainedModel, name: str = NAME) -> None:
    """Makes every attention of `model` call the function registered under `name`.

    Stack by stack: transformers before 5.20 passes by T5's, whose configurations are copies of the model's,
    and prefixes would be left out without a word.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation(name)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
