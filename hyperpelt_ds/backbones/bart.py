"""BART and Marian: post-norm blocks whose feed-forward is two bare linears.

Not mBART, whose first decoder token is the last label (a language code), so that labels mean something else there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn

from hyperpelt_ds.backbones import seq2seq
from hyperpelt_ds.backbones.family import Family, Sublayer
from hyperpelt_ds.contracts import Block, Site


def _sublayers(model: Any) -> Iterator[Sublayer]:
    for number, layer in enumerate(model.get_encoder().layers):
        yield _attention(Site(Block.ENCODER_SELF, number), layer.self_attn)
        yield _ffn(Site(Block.ENCODER_FFN, number), layer)
    for number, layer in enumerate(model.get_decoder().layers):
        yield _attention(Site(Block.DECODER_SELF, number), layer.self_attn)
        yield _attention(Site(Block.DECODER_CROSS, number), layer.encoder_attn)
        yield _ffn(Site(Block.DECODER_FFN, number), layer)


def _attention(site: Site, module: Any) -> Sublayer:
    linears = dict(query=module.q_proj, key=module.k_proj, value=module.v_proj, output=module.out_proj)
    return Sublayer(site, module.q_proj, module.out_proj, linears, module)


def _ffn(site: Site, layer: Any) -> Sublayer:
    return Sublayer(site, layer.fc1, layer.fc2, dict(up=layer.fc1, down=layer.fc2))


def _norms(model: Any) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, nn.LayerNorm))


def _embed(model: Any, ids: Tensor) -> Tensor:
    encoder = model.get_encoder()
    embedded: Tensor = encoder.embed_tokens(ids) * getattr(encoder, "embed_scale", 1.0)  # BART's module scales itself
    return embedded


FAMILY = Family(
    model_types=("bart", "marian"),
    layout=seq2seq.LAYOUT,
    sublayers=_sublayers,
    blocks=lambda model: chain(model.get_encoder().layers, model.get_decoder().layers),
    norms=_norms,
    prefix_size=lambda model: model.config.d_model,
    embed=_embed,
    positions=lambda model: model.get_encoder().embed_positions,
    dropout_fields=("dropout", "attention_dropout", "activation_dropout"),
    no_dropout_fields=("encoder_layerdrop", "decoder_layerdrop"),
)
