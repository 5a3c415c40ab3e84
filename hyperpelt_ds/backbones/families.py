"""Which transformers models can be a backbone."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from hyperpelt_ds.backbones import bart, llama, t5
from hyperpelt_ds.backbones.family import Family

FAMILIES = (bart.FAMILY, llama.FAMILY, t5.FAMILY)


def family_of(model_type: str, where: str) -> Family:
    """The family of a transformers model type; a ValueError lists what is supported."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    supported = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise ValueError(f"model.backbone: {where!r} has model type {model_type!r}; supported are {supported}")


def random_model(model_type: str, **fields: Any) -> Any:
    """An untrained model of a supported type with the given configuration fields: for benchmarks and tests."""
    layout = family_of(model_type, model_type).layout
    return layout.auto_class.from_config(AutoConfig.for_model(model_type, **fields))
