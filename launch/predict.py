"""Answers a file of inputs with a trained run, one line each or as a leaderboard wants them."""

from __future__ import annotations

from command import run


def predict(
    *,
    run_dir: str,
    input: str,
    out: str,
    format: str = "jsonl",
    task: str | None = None,
    split: str = "test",
    local_rank: int = 0,
) -> None:
    """Write a run's answers to the lines of a JSONL file, or to a split of a manifest, into a folder.

    A line is {"task": ..., "source": ...}, with "image": path of a picture where the task needs one (relative to the
    file's folder), and "key" to name it; "text" does for "source".

    Examples:
        python launch/predict.py --run_dir runs/demo --input questions.jsonl --out answers
        python launch/predict.py --run_dir runs/demo --input reviews.jsonl --task movie_sentiment --out answers
        deepspeed --num_accelerators 2 launch/predict.py --run_dir runs/glue --input data/glue/manifest.json
            --split official_test --format glue --out submission

    Args:
        run_dir: folder of a trained run; its best checkpoint answers
        input: NAME.jsonl, or a manifest.json
        out: folder for predictions.jsonl, or for the files of the format
        format: jsonl, glue (CoLA.tsv, SST-2.tsv, ...; the server also wants AX and WNLI) or vqa (a list a task); the
            last two need keys that end with the example's index or question id, a JSONL line's place being its key
        task: the task of lines that name none; of a manifest, the only one to answer
        split: which split of a manifest; MNLI's answers to one with "mismatched" in its name become MNLI-mm.tsv
        local_rank: set by the DeepSpeed launcher
    """
    from hyperpelt_ds.train import predict

    predict.predict(run_dir, input, out, format, task, split)


if __name__ == "__main__":
    run(predict)
