"""Named runs: one function each, that returns a Config and says in its docstring how to run it and what to expect.

A recipe knows numbers and paths only. Precision, ZeRO, buckets and offload are the DeepSpeed JSON's. Counts in the
docstrings are ours (`launch/estimate.py` prints them); figures of the paper are given only where they were read, and
none of them is reproduced here, since its models and data could not be reached.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from hyperpelt_ds.config import Config
from hyperpelt_ds.recipes.baselines import (
    adapters_t5_base,
    full_t5_base,
    hyperformer_pp_t5_base,
    lora_t5_base,
    mam_t5_base,
    prefix_t5_base,
)
from hyperpelt_ds.recipes.demo import demo
from hyperpelt_ds.recipes.glue import glue_bart_base, glue_t5_base, hyperprefix_t5_base
from hyperpelt_ds.recipes.vl import vl_t5_base

__all__ = ["RECIPES", "get"]

RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        demo,
        glue_t5_base,
        glue_bart_base,
        hyperprefix_t5_base,
        hyperformer_pp_t5_base,
        adapters_t5_base,
        prefix_t5_base,
        mam_t5_base,
        lora_t5_base,
        full_t5_base,
        vl_t5_base,
    )
}


def get(name: str) -> Config:
    """The recipe of that name; raises ValueError with the nearest names."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 3, 0.4) or sorted(RECIPES)
        raise ValueError(f"unknown recipe {name!r}; did you mean {', '.join(near)}?")
    return RECIPES[name]()
