"""BART and Marian: post-norm blocks whose feed-forward is two bare linears.

Not mBART, whose first decoder token is the last label (a language code), so that labels mean something else there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from hyperpelt_ds.backbones.family import Family
from hyperpelt_ds.contracts import Block, Site


def _attentions(model: Any) -> Iterator[tuple[Site, nn.Module]]:
    for number, layer in enumerate(model.get_encoder().layers):
        yield Site(Block.ENCODER_SELF, number), layer.self_attn
    for number, layer in enumerate(model.get_decoder().layers):
        yield Site(Block.DECODER_SELF, number), layer.self_attn
        yield Site(Block.DECODER_CROSS, number), layer.encoder_attn


def _ffns(model: Any) -> Iterator[tuple[Site, nn.Module, nn.Module]]:
    for block, stack in ((Block.ENCODER_FFN, model.get_encoder()), (Block.DECODER_FFN, model.get_decoder())):
        for number, layer in enumerate(stack.layers):
            yield Site(block, number), layer.fc1, layer.fc2


def _norms(model: Any) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, nn.LayerNorm))


FAMILY = Family(
    model_types=("bart", "marian"),
    attentions=_attentions,
    ffns=_ffns,
    norms=_norms,
    prefix_size=lambda model: model.config.d_model,
    dropout_fields=("dropout", "attention_dropout", "activation_dropout"),
    no_dropout_fields=("encoder_layerdrop", "decoder_layerdrop"),
)
