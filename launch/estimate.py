"""Counts what a recipe would train, and what a run of it would cost, without loading anything."""

from __future__ import annotations

from command import run


def estimate(
    *overrides: str,
    recipe: str,
    tasks: int = 0,
    ds_config: str | None = None,
    world_size: int = 1,
    batch_tasks: int = 0,
    batch_images: int = -1,
    backend: str = "nccl",
    json: bool = False,
) -> None:
    """Print the trainable parameters of a recipe by part, their share of the backbone, and bytes.

    With --ds_config also the memory of a rank by part, and the bytes that a rank sends in an optimizer step.

    Examples:
        python launch/estimate.py --recipe glue_t5_base
        python launch/estimate.py --recipe adapters_t5_base --tasks 1 --json
        python launch/estimate.py --recipe glue_t5_base model.backbone=google/t5-v1_1-xxl modules.bottleneck=64
        python launch/estimate.py --recipe glue_t5_base --ds_config ds_configs/zero2.json --world_size 4
        python launch/estimate.py --recipe vl_t5_base --ds_config ds_configs/zero3.json --world_size 8 --batch_images 4

    The shapes of the published T5, T5 v1.1, Flan-T5 and BART models are known by hub id; a local folder is read.

    Args:
        overrides: any number of section.key=value that replace values of the recipe
        recipe: name of a recipe in hyperpelt_ds/recipes/
        tasks: how many tasks; 0 for those of the recipe
        ds_config: a DeepSpeed JSON, for memory and bytes on the wire
        world_size: ranks of the run
        batch_tasks: different tasks in a micro-batch; 0 for as many as can be
        batch_images: different images in a micro-batch, 0 for text only; -1 for one a sample if the run sees images
        backend: what the ranks reduce with, nccl or gloo
        json: print one JSON object instead of tables
    """
    import dataclasses
    from json import dumps

    from hyperpelt_ds import counts, recipes
    from hyperpelt_ds.forecast import tables

    if world_size < 1:
        raise ValueError(f"--world_size must be at least 1, got {world_size}")
    config = recipes.get(recipe).override(overrides)
    found = counts.estimate(config, tasks)
    printed, page = {"recipe": recipe, **dataclasses.asdict(found)}, [counts.table(found, frozen=ds_config is None)]
    if ds_config is not None:
        mix = tables.mix_of(config, found.tasks, world_size, batch_tasks, batch_images)
        foretold = tables.forecast(config, ds_config, world_size, found.tasks, mix, backend)
        printed["forecast"] = foretold.as_dict()
        page.append(tables.text(foretold))
    print(dumps(printed, indent=1) if json else "\n\n".join(page))


if __name__ == "__main__":
    run(estimate)
