"""Answers one text with a trained run."""

from __future__ import annotations

from command import run


def generate(*, run_dir: str, task: str, text: str, image: str | None = None, num_beams: int = 1) -> None:
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
    """
    from hyperpelt_ds.model import load

    print(load(run_dir).generate(task, [text], [image] if image else None, num_beams=num_beams)[0])


if __name__ == "__main__":
    run(generate)
