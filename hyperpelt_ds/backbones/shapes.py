"""Shapes of published models, so that a run can be counted where nothing can be downloaded.

Only numbers of configurations; no weights, no tokenizers. What is not listed is read from its own configuration.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoConfig

from hyperpelt_ds.backbones.families import family_of, random_model


def _t5(layers: int, size: int, heads: int, head_size: int, hidden: int, gated: bool = False) -> dict[str, Any]:
    # v1.1 and Flan are gated, and their output embedding is their own
    kind = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False) if gated else {}
    stacks = dict(num_layers=layers, d_model=size, num_heads=heads, d_kv=head_size, d_ff=hidden)
    return {"model_type": "t5", "vocab_size": 32128, "decoder_start_token_id": 0, **stacks, **kind}


def _bart(layers: int, size: int, heads: int, hidden: int) -> dict[str, Any]:
    stacks = {
        f"{stack}_{name}": value
        for stack in ("encoder", "decoder")
        for name, value in (("layers", layers), ("attention_heads", heads), ("ffn_dim", hidden))
    }
    return {"model_type": "bart", "d_model": size, "vocab_size": 50265, "max_position_embeddings": 1024, **stacks}


_GATED = {
    "small": _t5(8, 512, 6, 64, 1024, True),
    "base": _t5(12, 768, 12, 64, 2048, True),
    "large": _t5(24, 1024, 16, 64, 2816, True),
    "xl": _t5(24, 2048, 32, 64, 5120, True),
    "xxl": _t5(24, 4096, 64, 64, 10240, True),
}
SHAPES: dict[str, dict[str, Any]] = {
    "google-t5/t5-small": _t5(6, 512, 8, 64, 2048),
    "google-t5/t5-base": _t5(12, 768, 12, 64, 3072),
    "google-t5/t5-large": _t5(24, 1024, 16, 64, 4096),
    "google-t5/t5-3b": _t5(24, 1024, 32, 128, 16384),
    "google-t5/t5-11b": _t5(24, 1024, 128, 128, 65536),
    **{f"google/t5-v1_1-{size}": shape for size, shape in _GATED.items()},
    **{f"google/flan-t5-{size}": shape for size, shape in _GATED.items()},
    "facebook/bart-base": _bart(6, 768, 12, 3072),
    "facebook/bart-large": _bart(12, 1024, 16, 4096),
}
SENTENCE_SIZES = {
    "sentence-transformers/all-MiniLM-L6-v2": 384,
    "sentence-transformers/all-mpnet-base-v2": 768,
}


def untrained(where: str, dropout: float | None = None) -> Any:
    """A model with the shape of a hub id or local folder and no trained weights; build it on the meta device.

    Its type is torch's default, whatever the configuration says; dropout is as `load_backbone` sets it.

    Raises ValueError that names the path, and the shapes that are known, where no configuration can be read.
    """
    fields = dict(SHAPES[where]) if where in SHAPES else _config("model.backbone", where, SHAPES).to_dict()
    fields.pop("dtype", None)
    family = family_of(fields["model_type"], where)
    fields |= dict.fromkeys(family.dropout_fields, dropout) if dropout is not None else {}
    fields |= dict.fromkeys(family.no_dropout_fields, 0.0)
    model = random_model(fields.pop("model_type"), **fields)
    # transformers ties the two embeddings of every T5 that it makes, and unties them when it loads one of these
    if not getattr(model.config, "scale_decoder_outputs", True):
        model.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    return model


def sentence_size(where: str) -> int:
    """The length of the vectors of a sentence encoder; ValueError as above."""
    if where in SENTENCE_SIZES:
        return SENTENCE_SIZES[where]
    size: int = _config("hypernet.sentence_encoder", where, SENTENCE_SIZES).hidden_size
    return size


def _config(field: str, where: str, known: dict[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(where)
    except OSError as error:
        raise ValueError(
            f"{field}: cannot read the shape of {where!r}: {str(error).splitlines()[0]}; known without it are "
            f"{', '.join(known)}"
        ) from error
