"""Writes the weights that a trained run makes for one task as files of their own."""

from __future__ import annotations

from command import run


def export(
    *,
    run_dir: str,
    task: str,
    out: str,
    image: str | None = None,
    format: str = "safetensors",
    task_file: str | None = None,
) -> None:
    """Write one task's weights, or one image's under it, for use without this package; print how exact they are.

    Examples:
        python launch/export.py --run_dir runs/demo --task movie_sentiment --out exported/sentiment
        python launch/export.py --run_dir runs/demo --task easy_vqa --image shape.png --out exported/shape
        python launch/export.py --run_dir runs/lora_t5_base --task glue_mnli --out exported/mnli --format peft

    Args:
        run_dir: folder of a trained run; its best checkpoint is exported
        task: one of the run's tasks
        out: a new folder, or an empty one
        image: an image file, for tasks that see images
        task_file: a task that was trained on top of the run, as a file
        format: safetensors (with its own loader, every kind of module) or peft (runs of LoRA alone)
    """
    from hyperpelt_ds.export import export as write

    write(run_dir, task, image, out=out, format=format, task_file=task_file)
    print(f"next: {out}/README.md shows how they are loaded")


if __name__ == "__main__":
    run(export)
