"""Counts what a recipe would train, without loading anything."""

from __future__ import annotations

from command import run


def estimate(*overrides: str, recipe: str, tasks: int = 0, json: bool = False) -> None:
    """Print the trainable parameters of a recipe by part, their share of the backbone, and bytes.

    Examples:
        python launch/estimate.py --recipe glue_t5_base
        python launch/estimate.py --recipe adapters_t5_base --tasks 1 --json
        python launch/estimate.py --recipe glue_t5_base model.backbone=google/t5-v1_1-xxl modules.bottleneck=64

    The shapes of the published T5, T5 v1.1, Flan-T5 and BART models are known by hub id; a local folder is read.

    Args:
        overrides: any number of section.key=value that replace values of the recipe
        recipe: name of a recipe in hyperpelt_ds/recipes/
        tasks: how many tasks; 0 for those of the recipe
        json: print one JSON object instead of a table
    """
    import dataclasses
    from json import dumps

    from hyperpelt_ds import counts, recipes

    found = counts.estimate(recipes.get(recipe).override(overrides), tasks)
    print(dumps({"recipe": recipe, **dataclasses.asdict(found)}, indent=1) if json else counts.table(found))


if __name__ == "__main__":
    run(estimate)
