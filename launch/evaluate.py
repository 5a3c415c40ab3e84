"""Scores a trained run on held-out samples."""

from __future__ import annotations

from command import run


def evaluate(
    *,
    run_dir: str,
    tasks: str | None = None,
    split: str = "test",
    out: str | None = None,
    shuffle: str = "task,image",
    local_rank: int = 0,
) -> None:
    """Print a run's table of scores and write it to RUN_DIR/results.json.

    Examples:
        python launch/evaluate.py --run_dir runs/demo
        python launch/evaluate.py --run_dir runs/demo --tasks easy_vqa,movie_sentiment --split validation
        python launch/evaluate.py --run_dir runs/demo --shuffle none
        deepspeed --num_accelerators 2 launch/evaluate.py --run_dir runs/demo

    Args:
        run_dir: folder of a trained run; its best checkpoint is scored
        tasks: names separated by commas; all of the run if left out
        split: which split to score
        out: where to write the results; RUN_DIR/results.json if left out
        shuffle: controls separated by commas (task, image), each scored beside the true score; or none
        local_rank: set by the DeepSpeed launcher
    """
    from hyperpelt_ds.train import evaluate

    controls = [] if shuffle == "none" else shuffle.split(",")
    evaluate.evaluate(run_dir, tasks.split(",") if tasks else None, split, out, controls)


if __name__ == "__main__":
    run(evaluate)
