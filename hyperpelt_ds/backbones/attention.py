"""The attention function and mask function that transformers calls by name, for every family alike.

The mask function is registered under the same name on purpose: without it padding would silently be attended to,
and for an unpadded decoder the mask would be None with causality left to a flag, which a prefix breaks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from hyperpelt_ds.backbones.slot import Slot
from hyperpelt_ds.kernels import prefix_attention

NAME = "hyperpelt"


def attach(module: nn.Module, slot: Slot, site: int) -> None:
    """Makes `module`'s attention read the prefixes of attention site number `site` from `slot`."""
    module.__dict__["hyperpelt_site"] = (slot, site)


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
    slot, site = module.__dict__["hyperpelt_site"]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    prefixes = slot.prefixes(site, query.shape[0])
    output = prefix_attention(query, key, value, prefixes, attention_mask, position_bias, scale, dropout)
    return output.transpose(1, 2).contiguous(), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """A bool mask, True where a query may look; always built, never skipped."""
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
