"""From a folder or hub id to a frozen model with places for generated weights."""

from __future__ import annotations

from typing import cast

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from hyperpelt_ds import dist
from hyperpelt_ds.backbones.base import Backbone
from hyperpelt_ds.backbones.families import family_of
from hyperpelt_ds.backbones.hub import cannot_load, check_whole
from hyperpelt_ds.config import ModelConfig, ModulesConfig


def load_backbone(config: ModelConfig, modules: ModulesConfig | None = None) -> Backbone:
    """Loads a local folder or hub id, frozen unless it is to be trained, with dropout, type and checkpointing as
    configured, and places for `modules`. Where it is to be split over several ranks, all of them call it, and those of
    a node read it one after the other: then one of them has the whole model, for as long as it takes.

    Raises ValueError for an unsupported model type, a type of numbers that the model overflows in, a padding token that
    the model does not have, and one that names the path where nothing can be loaded, or not all weights.
    """
    if not config.shard_backbone or dist.world_size() == 1:
        return _load(config, modules)

    def load() -> Backbone:
        backbone = _load(config, modules)
        backbone.shard()
        return backbone

    return dist.one_after_another(load)


def _load(config: ModelConfig, modules: ModulesConfig | None) -> Backbone:
    where = config.backbone
    if not where:
        raise ValueError("model.backbone: give a local folder or a hub id")
    try:
        model_config = AutoConfig.from_pretrained(where)
        family = family_of(model_config.model_type, where)
        if family.overflows_in_float16 and config.dtype == "float16":
            raise ValueError(
                f"model.dtype: activations of published {model_config.model_type} models leave the range of float16 "
                f"and become NaN; use bfloat16 or float32"
            )
        if config.dropout is not None:
            for name in family.dropout_fields:
                setattr(model_config, name, config.dropout)
        for name in family.no_dropout_fields:
            setattr(model_config, name, 0.0)
        tokenizer = family.layout.tokenizer(_tokenizer(where))
        dtype = getattr(torch, config.dtype)
        model, loaded = family.layout.auto_class.from_pretrained(
            where, config=model_config, dtype=dtype, output_loading_info=True
        )
        check_whole("model.backbone", where, loaded["missing_keys"])
    except OSError as error:
        raise cannot_load("model.backbone", where, error) from error
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        raise ValueError(
            f"model.backbone: {where} has {rows} embeddings, and its tokenizer pads with number "
            f"{tokenizer.pad_token_id}; name one that the model has in its tokenizer_config.json, for example its end"
        )
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    backbone = Backbone(model, tokenizer, modules, config.train_backbone, config.prefix_form)
    if config.quantize == "int8":
        backbone.quantize()
    return backbone


def _tokenizer(where: str) -> PreTrainedTokenizerBase:
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(where))
    except TypeError as error:  # how transformers 5.24 takes a tokenizer's file that is not there
        raise OSError(f"a file of its tokenizer is missing ({error})") from error
