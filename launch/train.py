"""Trains a recipe. All that it decides is in the recipe, the DeepSpeed JSON and the overrides."""

from __future__ import annotations

from command import run


def train(
    *overrides: str,
    ds_config: str,
    run_dir: str,
    recipe: str | None = None,
    init_from: str | None = None,
    new_task: str | None = None,
    like: str | None = None,
    train: str = "all",
    resume: bool = False,
    dry_run: bool = False,
    local_rank: int = 0,
) -> None:
    """Train a recipe with DeepSpeed; watch it with `tensorboard --logdir RUN_DIR`.

    `deepspeed --quiet` leaves out the launcher's own lines.

    Examples:
        deepspeed --num_accelerators 2 launch/train.py --recipe demo --ds_config ds_configs/zero2_cpu.json
            --run_dir runs/demo --dry_run
        deepspeed --num_accelerators 2 launch/train.py --recipe demo --ds_config ds_configs/zero2_cpu.json
            --run_dir runs/demo
        torchrun --nproc_per_node 2 launch/train.py --recipe demo --ds_config ds_configs/zero2_cpu.json
            --run_dir runs/demo --resume
        python launch/train.py --recipe demo --ds_config ds_configs/zero2_cpu.json --run_dir runs/short
            train.steps=20 data.tasks=movie_sentiment,easy_vqa
        python launch/train.py --init_from runs/demo --new_task my_task --train embeddings
            --ds_config ds_configs/zero2_cpu.json --run_dir runs/my_task data.manifest=data/mine/manifest.json

    Args:
        overrides: any number of section.key=value that replace values of the recipe
        ds_config: DeepSpeed JSON, one of ds_configs/ or your own
        run_dir: folder of the run; must be new or empty without --resume
        recipe: name of a recipe in hyperpelt_ds/recipes/; this or --init_from
        init_from: folder of a finished run to start from, with its configuration
        new_task: tasks (separated by commas) that are added to those of --init_from, and trained on
        like: the task of --init_from that new tasks start from; if left out, the one that answers them best
        train: with --new_task, "all" trainables, or only the "embeddings" of the new tasks, which leaves all others as
            they are and writes RUN_DIR/tasks/NAME.safetensors, to be added to the other run
        resume: continue from the newest valid checkpoint in run_dir, or start if there is none
        dry_run: only load, compare and take two steps; says what they cost, the largest micro-batch that fits, and the
            command to run next; writes nothing
        local_rank: set by the DeepSpeed launcher
    """
    from hyperpelt_ds import dist, recipes
    from hyperpelt_ds.train import loop, rehearsal, transfer

    if (recipe is None) == (init_from is None):
        raise ValueError(
            "give either --recipe NAME, to start anew, or --init_from RUN_DIR, to start from a run's weights"
        )
    if train not in ("all", "embeddings"):
        raise ValueError(f"--train {train}: allowed are all and embeddings")
    if init_from is not None:
        names = [name for name in (new_task or "").split(",") if name]
        config = transfer.requested(init_from, names, like, train, run_dir, resume)
    else:
        assert recipe is not None
        if new_task or like or train != "all":
            raise ValueError("--new_task, --like and --train need --init_from")
        config = recipes.get(recipe)
    config = config.override(overrides)
    if dry_run:
        print(rehearsal.rehearse(config, ds_config, run_dir, resume), end="", flush=True)
        return
    loop.train(config, ds_config, run_dir, resume)
    if dist.rank() == 0:
        print(f"next: python launch/evaluate.py --run_dir {run_dir}", flush=True)


if __name__ == "__main__":
    run(train)
