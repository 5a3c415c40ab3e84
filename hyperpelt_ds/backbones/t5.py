"""T5 v1.0, v1.1 and Flan, and mT5: pre-norm blocks with scale-only norms and a shared relative position bias."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.models.mt5.modeling_mt5 import MT5LayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from hyperpelt_ds.backbones.family import Family
from hyperpelt_ds.contracts import Block, Site


def _attentions(model: Any) -> Iterator[tuple[Site, nn.Module]]:
    for number, block in enumerate(model.get_encoder().block):
        yield Site(Block.ENCODER_SELF, number), block.layer[0].SelfAttention
    for number, block in enumerate(model.get_decoder().block):
        yield Site(Block.DECODER_SELF, number), block.layer[0].SelfAttention
        yield Site(Block.DECODER_CROSS, number), block.layer[1].EncDecAttention


def _ffns(model: Any) -> Iterator[tuple[Site, nn.Module, nn.Module]]:
    for block, stack in ((Block.ENCODER_FFN, model.get_encoder()), (Block.DECODER_FFN, model.get_decoder())):
        for number, layer in enumerate(stack.block):
            ffn = layer.layer[-1].DenseReluDense
            yield Site(block, number), ffn, ffn


def _norms(model: Any) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, (T5LayerNorm, MT5LayerNorm)))


FAMILY = Family(
    model_types=("t5", "mt5"),
    attentions=_attentions,
    ffns=_ffns,
    norms=_norms,
    prefix_size=lambda model: model.config.num_heads * model.config.d_kv,
    dropout_fields=("dropout_rate",),
)
