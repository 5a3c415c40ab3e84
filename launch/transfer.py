"""Few-shot transfer of a trained run to a new task: shots x seeds, with mean and standard error."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from command import run


def transfer(
    *overrides: str,
    run_dir: str,
    new_task: str,
    out: str,
    ds_config: str,
    shots: str = "16,64,256",
    seeds: int = 5,
    like: str | None = None,
    train: str = "all",
    split: str = "test",
    launcher: str = sys.executable,
) -> None:
    """Train a new task from a finished run with few samples, several times, and print mean and standard error.

    Every cell is an ordinary run in OUT/SHOTS_shots_seed_SEED; finished cells are not run again, so the command can be
    repeated after an interruption. The last weights are scored: few-shot runs have no samples to choose a step with.

    Examples:
        python launch/transfer.py --run_dir runs/demo --new_task my_task --out runs/few
            --ds_config ds_configs/zero2_cpu.json --shots 16,64 --seeds 3 train.steps=100 train.learning_rate=0.01

    Args:
        overrides: any number of section.key=value, for example data.manifest, train.steps and train.learning_rate
        run_dir: folder of the finished run to start from
        new_task: the task; the manifest in use must have its samples
        out: folder for the runs and for transfer.json, which holds all scores
        ds_config: DeepSpeed JSON of the runs
        shots: numbers of training samples, separated by commas
        seeds: how many seeds; a seed chooses the samples and their order
        like: the task of the run to start from; if left out, the one that answers the samples best
        train: "all" trainables, or only the new task's "embeddings", which leaves all others as they are
        split: which split is scored
        launcher: what runs a script, for example "deepspeed --num_accelerators 2"
    """
    counts = [part for part in shots.split(",") if part]
    if not counts or not all(count.isdigit() and int(count) for count in counts) or seeds < 1:
        raise ValueError(f"--shots {shots} --seeds {seeds}: expected numbers above 0, as in --shots 16,64 --seeds 3")
    for assignment in overrides:
        name = assignment.partition("=")[0]
        if name in ("data.shots", "train.seed", "train.eval_every"):
            raise ValueError(
                f"{assignment}: every cell has its own {name}; --shots and --seeds say which cells there are"
            )
    request: dict[str, object] = {"run_dir": run_dir, "task": new_task, "train": train, "like": like, "split": split}
    request |= {"ds_config": ds_config, "overrides": list(overrides)}
    asked = Path(out, "request.json")
    before = json.loads(asked.read_text()) if asked.is_file() else request
    if before != request:
        raise ValueError(f"--out {out} holds runs of another request: {before}, now {request}; give another folder")
    asked.parent.mkdir(parents=True, exist_ok=True)
    asked.write_text(json.dumps(request, indent=1) + "\n")
    here, rows = Path(__file__).resolve().parent, []
    for count in counts:
        scores = []
        for seed in range(seeds):
            cell = Path(out) / f"{count}_shots_seed_{seed}"
            if _score(cell, new_task, split) is None:
                start = ["--init_from", run_dir, "--new_task", new_task, "--train", train, "--ds_config", ds_config]
                start += ["--like", like] if like else []
                # validated at the last step only, which is so the best one
                own = [f"data.shots={count}", f"train.seed={seed}", "train.eval_every=1000000000", *overrides]
                _call(launcher, here / "train.py", *start, "--run_dir", str(cell), "--resume", *own)
                score = ["--run_dir", str(cell), "--tasks", new_task, "--split", split, "--shuffle", "none"]
                _call(launcher, here / "evaluate.py", *score)
            scored = _score(cell, new_task, split)
            assert scored is not None, f"{cell} was scored just now"
            scores.append(scored)
        mean, error = statistics.mean(scores), statistics.stdev(scores) / seeds**0.5 if seeds > 1 else None
        rows.append({"shots": int(count), "mean": mean, "standard_error": error, "scores": scores})
    Path(out, "transfer.json").write_text(json.dumps({**request, "rows": rows}, indent=1) + "\n")
    print(f"{new_task}, {train} trained, {seeds} seeds, {split} split")
    for row in rows:
        spread = "one seed" if row["standard_error"] is None else f"+- {row['standard_error']:.3f} (standard error)"
        print(f"{row['shots']:6} shots  {row['mean']:.3f} {spread}")
    print(f"wrote {Path(out, 'transfer.json')}")
    print(f"next: python launch/evaluate.py --run_dir {Path(out, f'{count}_shots_seed_0')}")


def _score(cell: Path, task: str, split: str) -> float | None:
    """A cell's score; None if it has none yet, or what evaluate.py wrote there since is of another split or task."""
    file = cell / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {"tasks": {}}
    return results["tasks"][task]["score"] if task in results["tasks"] and results["split"] == split else None


def _call(launcher: str, script: Path, *arguments: str) -> None:
    done = subprocess.run([*shlex.split(launcher), str(script), *arguments])
    if done.returncode:
        raise ValueError(f"{script.name} {' '.join(arguments)} failed with exit code {done.returncode}, see above")


if __name__ == "__main__":
    run(transfer)
