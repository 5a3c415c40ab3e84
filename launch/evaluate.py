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
    manifest: str | None = None,
    task_files: str | None = None,
    local_rank: int = 0,
) -> None:
    """Print a run's table of scores and write it to RUN_DIR/results.json.

    Examples:
        python launch/evaluate.py --run_dir runs/demo
        python launch/evaluate.py --run_dir runs/demo --tasks easy_vqa,movie_sentiment --split validation
        python launch/evaluate.py --run_dir runs/demo --shuffle task,image,layer
        python launch/evaluate.py --run_dir runs/demo --tasks my_task --out my_task.json
            --task_files runs/my_task/tasks/my_task.safetensors --manifest data/mine/manifest.json
        deepspeed --num_accelerators 2 launch/evaluate.py --run_dir runs/demo

    Args:
        run_dir: folder of a trained run; its best checkpoint is scored
        tasks: names separated by commas; all of the run if left out
        split: which split to score
        out: where to write the results; RUN_DIR/results.json if left out
        shuffle: controls separated by commas, each scored beside the true score, or none: another task, image or layer
            (task, image, layer); of a run with described tasks, what is said about another task (description), the same
            in other words (paraphrase), or a sentence about no task (unrelated)
        manifest: other data to score than the run was trained on
        task_files: files of tasks that were trained on top of the run, separated by commas
        local_rank: set by the DeepSpeed launcher
    """
    from hyperpelt_ds import dist
    from hyperpelt_ds.train import evaluate

    controls = [] if shuffle == "none" else shuffle.split(",")
    files = task_files.split(",") if task_files else []
    evaluate.evaluate(run_dir, tasks.split(",") if tasks else None, split, out, controls, manifest, files)
    if dist.rank() == 0:
        print(f"next: python launch/predict.py --run_dir {run_dir} --input questions.jsonl --out answers, or export.py")


if __name__ == "__main__":
    run(evaluate)
