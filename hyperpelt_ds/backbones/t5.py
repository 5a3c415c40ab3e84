"""T5 v1.0, v1.1 and Flan, and mT5: pre-norm blocks with scale-only norms and a shared relative position bias."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn
from transformers.models.mt5.modeling_mt5 import MT5LayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from hyperpelt_ds.backbones import seq2seq
from hyperpelt_ds.backbones.family import Family, Sublayer
from hyperpelt_ds.contracts import Block, Site


def _sublayers(model: Any) -> Iterator[Sublayer]:
    for number, block in enumerate(model.get_encoder().block):
        yield _attention(Site(Block.ENCODER_SELF, number), block.layer[0].SelfAttention)
        yield _ffn(Site(Block.ENCODER_FFN, number), block.layer[-1].DenseReluDense)
    for number, block in enumerate(model.get_decoder().block):
        yield _attention(Site(Block.DECODER_SELF, number), block.layer[0].SelfAttention)
        yield _attention(Site(Block.DECODER_CROSS, number), block.layer[1].EncDecAttention)
        yield _ffn(Site(Block.DECODER_FFN, number), block.layer[-1].DenseReluDense)


def _attention(site: Site, module: Any) -> Sublayer:
    return Sublayer(
        site, module.q, module.o, dict(query=module.q, key=module.k, value=module.v, output=module.o), module
    )


def _ffn(site: Site, module: Any) -> Sublayer:
    gated = hasattr(module, "wi_0")
    up = dict(gate=module.wi_0, up=module.wi_1) if gated else dict(up=module.wi)
    return Sublayer(site, module, module, {**up, "down": module.wo})


def _norms(model: Any) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, (T5LayerNorm, MT5LayerNorm)))


def _embed(model: Any, ids: Tensor) -> Tensor:
    embedded: Tensor = model.get_encoder().embed_tokens(ids)
    return embedded


FAMILY = Family(
    model_types=("t5", "mt5"),
    layout=seq2seq.LAYOUT,
    sublayers=_sublayers,
    blocks=lambda model: chain(model.get_encoder().block, model.get_decoder().block),
    norms=_norms,
    prefix_size=lambda model: model.config.num_heads * model.config.d_kv,
    embed=_embed,
    positions=lambda model: None,
    dropout_fields=("dropout_rate",),
    overflows_in_float16=True,
)
