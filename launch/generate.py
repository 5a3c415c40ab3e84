"""Answers one text with a trained run."""

from __future__ import annotations

from command import run


def generate(
    *,
    run_dir: str,
    task: str,
    text: str,
    image: str | None = None,
    num_beams: int = 1,
    task_file: str | None = None,
    description: str | None = None,
) -> None:
    """Print what a trained run generates for one input.

    Examples:
        python launch/generate.py --run_dir runs/demo --task movie_sentiment --text "a moving, funny film"
        python launch/generate.py --run_dir runs/demo --task easy_vqa --text "what color is the shape?"
            --image shape.png --num_beams 4

    Args:
        run_dir: folder of a trained run; its best checkpoint answers
        task: one of the run's tasks
        text: the input, as the task's samples have it
        image: an image file, for tasks that see images
        num_beams: beams of the search; 1 is greedy
        task_file: a task that was trained on top of the run, as a file
        description: what the task is, in a sentence, for a run whose tasks are described and that does not have it
    """
    from hyperpelt_ds.model import load

    predictor = load(run_dir, tasks=[task_file] if task_file else [])
    if description is not None:
        predictor.describe_task(task, description)
    print(predictor.generate(task, [text], [image] if image else None, num_beams=num_beams)[0])


if __name__ == "__main__":
    run(generate)
