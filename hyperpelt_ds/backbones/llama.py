"""Llama, Mistral and Qwen2: decoders alone, with scale-only norms, grouped queries and rotary positions.

A rotary position is turned into queries and keys before attention is called, so that prefix rows have none, and the
positions of real tokens start at 0 whatever the prefix length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from hyperpelt_ds.backbones import causal
from hyperpelt_ds.backbones.family import Family, Sublayer
from hyperpelt_ds.contracts import Block, Site


def _sublayers(model: Any) -> Iterator[Sublayer]:
    for number, layer in enumerate(model.model.layers):
        attention, ffn = layer.self_attn, layer.mlp
        linears = dict(query=attention.q_proj, key=attention.k_proj, value=attention.v_proj, output=attention.o_proj)
        yield Sublayer(Site(Block.DECODER_SELF, number), attention.q_proj, attention.o_proj, linears, attention)
        linears = dict(gate=ffn.gate_proj, up=ffn.up_proj, down=ffn.down_proj)
        yield Sublayer(Site(Block.DECODER_FFN, number), ffn, ffn, linears)


def _norms(model: Any) -> Iterator[nn.Module]:
    for layer in model.model.layers:
        yield layer.input_layernorm
        yield layer.post_attention_layernorm
    yield model.model.norm


FAMILY = Family(
    model_types=("llama", "mistral", "qwen2"),
    layout=causal.LAYOUT,
    sublayers=_sublayers,
    blocks=lambda model: iter(model.model.layers),
    norms=_norms,
    prefix_size=lambda model: model.config.num_key_value_heads * model.model.layers[0].self_attn.head_dim,
    embed=lambda model, ids: model.get_input_embeddings()(ids),
    positions=lambda model: None,
    dropout_fields=("attention_dropout",),
)
