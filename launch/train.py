"""Trains a recipe. All that it decides is in the recipe, the DeepSpeed JSON and the overrides."""

from __future__ import annotations

from command import run


def train(
    *overrides: str,
    recipe: str,
    ds_config: str,
    run_dir: str,
    resume: bool = False,
    local_rank: int = 0,
) -> None:
    """Train a recipe with DeepSpeed; watch it with `tensorboard --logdir RUN_DIR`.

    Examples:
        deepspeed --num_accelerators 2 launch/train.py --recipe demo --ds_config ds_configs/zero2_cpu.json
            --run_dir runs/demo
        torchrun --nproc_per_node 2 launch/train.py --recipe demo --ds_config ds_configs/zero2_cpu.json
            --run_dir runs/demo --resume
        python launch/train.py --recipe demo --ds_config ds_configs/zero2_cpu.json --run_dir runs/short
            train.steps=20 data.tasks=movie_sentiment,easy_vqa

    Args:
        overrides: any number of section.key=value that replace values of the recipe
        recipe: name of a recipe in hyperpelt_ds/recipes.py
        ds_config: DeepSpeed JSON, one of ds_configs/ or your own
        run_dir: folder of the run; must be new or empty without --resume
        resume: continue from the newest valid checkpoint in run_dir, or start if there is none
        local_rank: set by the DeepSpeed launcher
    """
    from hyperpelt_ds import recipes
    from hyperpelt_ds.train import loop

    loop.train(recipes.get(recipe).override(overrides), ds_config, run_dir, resume)


if __name__ == "__main__":
    run(train)
