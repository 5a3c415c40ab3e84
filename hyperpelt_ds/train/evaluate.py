"""Scores by generation: the validation of a running training, and the table of a finished run.

This file must not know how a task judges an answer (that is the task's) nor how the model was trained.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hyperpelt_ds import dist, tasks
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import TRAIN, Sample
from hyperpelt_ds.data.choice import choose
from hyperpelt_ds.data.collate import collator_for
from hyperpelt_ds.data.evaluation import evaluation_batches, read_texts
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.data.reader import DamagedSample, Reader
from hyperpelt_ds.model import HyperPELT, identity_of, load
from hyperpelt_ds.tasks import Task, baselines, glue, metrics
from hyperpelt_ds.tasks.task import check_target
from hyperpelt_ds.terminal import progress
from hyperpelt_ds.train import engine
from hyperpelt_ds.train.answering import answers, asker, generate, known_tasks, load_manifest, split_samples
from hyperpelt_ds.train.controls import CONTROLS, DEFAULT

log = dist.logger(__name__)

CONTROL_SAMPLES = 500
"""At most so many samples of a task are answered under a control: a contrast needs no narrow interval."""
WORDS_SAMPLES = 30_000
"""At most so many training samples teach the bag of words."""


class Validation(NamedTuple):
    """scores: task -> metric -> score. answers: every sample that was scored, with what was answered."""

    scores: dict[str, dict[str, float]]
    answers: list[tuple[Sample, str]]


def validate(
    model: HyperPELT,
    manifest: Manifest,
    config: Config,
    split: str,
    limit: int,
    between: Callable[[], None] = lambda: None,
) -> Validation:
    """Scores every trained task on at most `limit` samples of `split` (0: all).

    Every rank calls it and gets the same result. The model must be in eval mode. `between` is called after each batch,
    equally often on every rank; what it raises ends the validation. A task without samples in the split,
    or without one that can be used, is left out with a warning; ValueError if that leaves none.
    """
    names = [name for name in config.trained_tasks if manifest.count(name, split)]
    left_out = [name for name in config.trained_tasks if name not in names]
    if not names:
        raise ValueError(f"no task of the run has samples of split {split!r} in {manifest.path}")
    if left_out:
        warnings.warn(f"not scored, without samples of split {split!r}: {', '.join(left_out)}", stacklevel=2)
    collator = collator_for(config, config.data.tasks, model.backbone.tokenizer)
    ranks = dist.rank(), dist.world_size()
    found: list[tuple[Sample, str]] = []
    batches = evaluation_batches(manifest, split, names, collator, config.eval.batch_size, *ranks, limit)
    for batch in progress(batches, f"batches of {split} answered"):
        answered = zip(batch.samples, generate(model, batch, config), batch.loss_weights.tolist(), strict=True)
        found += [(sample, text) for sample, text, weight in answered if weight]
        between()
    gathered = [answer for part in dist.gather(found) for answer in part]
    usable = {sample.task for sample, _ in gathered}
    unusable = [name for name in names if name not in usable]
    if not usable:
        raise ValueError(f"no sample of split {split!r} can be used in {manifest.path}, of {', '.join(names)}")
    if unusable:
        warnings.warn(f"not scored, no sample of split {split!r} can be used: {', '.join(unusable)}", stacklevel=2)
    scores: dict[str, dict[str, float]] = {}
    for name in names:
        if name in usable:
            samples, texts = zip(*(answer for answer in gathered if answer[0].task == name), strict=True)
            scores[name] = metrics.score(tasks.get(name), texts, samples)
    return Validation(scores, gathered)


def mean_score(scores: Mapping[str, Mapping[str, float]]) -> float:
    """The mean over tasks of each task's mean over its metrics: what picks the best checkpoint."""
    return float(np.mean([_mean(table) for table in scores.values()]))


def evaluate(
    run_dir: str | Path,
    names: Sequence[str] | None = None,
    split: str = "test",
    out: str | Path | None = None,
    shuffle: Sequence[str] = DEFAULT,
    manifest_path: str | Path | None = None,
    task_files: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Scores a run on all of `split`, prints the table and writes it to `out` (run_dir/results.json); returns it.

    `task_files` add tasks that were trained on top of the run. A run whose tasks are only described can be asked for
    any known task, trained or not. `manifest_path` names other data than the run was trained on. Each task
    is answered as it is, and once more under each control that `shuffle` names. Works in one process and under a
    launcher, where only rank 0 has the scores; they are the same for any number of processes. A sample whose image
    cannot be read is answered "" and counts, one whose text cannot be read is left out; a row says how many
    (`unreadable`, `left_out`). Raises ValueError for a folder that is no run, and for a task, split or control that it
    does not have or that is empty.
    """
    start = time.monotonic()
    for control in shuffle:
        if control not in CONTROLS:
            raise ValueError(f"--shuffle: unknown control {control!r}; there are {', '.join(CONTROLS)}, or none")
    if out is not None and not Path(out).resolve().parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {Path(out).parent}")
    if dist.world_size() > 1:
        engine.start_distributed()
    run = load(run_dir, dist.device(), task_files)
    config = run.config
    for name in names or ():
        if run.is_described and name not in run.model.tasks and name in tasks.TASKS:
            run.describe_task(name, tasks.get(name).description)
    manifest = load_manifest(manifest_path or config.data.manifest, run, run_dir)
    if names is None:
        names = [name for name in run.model.tasks if name in manifest.tasks]
        left_out = [name for name in run.model.tasks if name not in names]
        if left_out:
            log.info("not scored, since %s does not hold them: %s", manifest.path, ", ".join(left_out))
    names = known_tasks(names, run.model.tasks, run_dir)
    trained = {} if manifest_path is not None else identity_of(Path(run_dir))["data"]
    changed = [name for name, content in manifest.digests(names).items() if trained.get(name, content) != content]
    if changed:
        raise ValueError(
            f"{run_dir} was trained on other samples of {', '.join(changed)} than {config.data.manifest} now holds: "
            f"splits may differ. --manifest says which to score on all the same"
        )
    ask, size, pace = asker(run, Reader(manifest)), config.eval.batch_size, run.model.backbone.own_pace
    rows: dict[str, Any] = {}
    held = {name: split_samples(manifest, name, split) for name in names}
    for name, (samples, _) in held.items():  # before hours of answers
        for sample in samples:
            _check_scorable(tasks.get(name), sample, split)
    for name, (samples, damaged) in held.items():
        before = run.collator.truncated
        texts = answers(samples, ask, size, pace())
        truncated = sum(dist.gather(run.collator.truncated - before))
        some, others = _some(samples, CONTROL_SAMPLES), {}
        for control in shuffle:
            with CONTROLS[control](run, some) as asked:
                others[control] = [text or "" for text in answers(asked, ask, size, pace())]
        if dist.rank() == 0:
            train = _trained_on(manifest, config, name)
            rows[name] = _row(tasks.get(name), samples, [text or "" for text in texts], train)
            rows[name] |= _contrast(tasks.get(name), some, others) | {"truncated": truncated}
            rows[name] |= {"unreadable": texts.count(None), "left_out": len(damaged)}
            log.info("%s: score %.3f, %d samples", name, rows[name]["score"], len(samples))
    scoring = time.monotonic() - start
    results = {
        "tasks": rows,
        "glue_mean": glue.mean({name: _scores(row) for name, row in rows.items()}),
        **run.model.parameter_counts(),
        "split": split,
        "max_source_length": config.data.max_source_length,
        "seconds": _trained(Path(run_dir)) + scoring,
        "scoring_seconds": scoring,
    }
    if dist.rank() == 0:
        file = Path(out or Path(run_dir) / "results.json")
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{table(results)}\nwrote {file}", flush=True)
    return results


def _trained_on(manifest: Manifest, config: Config, task: str) -> list[Sample]:
    """The training samples of a task that can be read; of one that was trained on few shots, those."""
    damaged: dict[int, DamagedSample] = {}
    train, count = read_texts(manifest, task, TRAIN, damaged), manifest.count(task, TRAIN)
    if not config.data.shots or task not in config.trained_tasks:
        return train
    numbers = [number for number in range(count) if number not in damaged]
    chosen = set(choose(Reader(manifest), task, TRAIN, count, config.data.shots, str(config.train.seed)))
    return [sample for number, sample in zip(numbers, train, strict=True) if number in chosen]


def _check_scorable(task: Task, sample: Sample, split: str) -> None:
    if not (sample.target or sample.references):
        raise ValueError(
            f"task {task.name!r}, sample {sample.key!r}: split {split!r} has no answers to compare with; "
            f"launch/predict.py --manifest ... --split {split} writes what the run answers"
        )
    check_target(task, sample.key, sample.target)


def table(results: Mapping[str, Any]) -> str:
    """The results as text: one line a task; the metrics of a task that has several, and its groups, below it."""
    rows = results["tasks"]
    controls = dict.fromkeys(key for row in rows.values() for key in row if key.startswith("shuffled_"))
    columns = ["baseline", "bag_of_words", *(key for key in controls if key != "shuffled_n")]
    lines = [["task", "metric", "score", "95 % interval", *(name.replace("_", " ") for name in columns), "n"]]

    def line(label: str, metric: str, part: Mapping[str, Any]) -> list[str]:
        figures = [part.get(column) for column in columns]
        cells = [label, metric, f"{part['score']:.3f}", f"{part['low']:.3f} to {part['high']:.3f}"]
        cells += ["" if figure is None else f"{figure:.3f}" for figure in figures]
        return [*cells, str(part.get("n", ""))]

    for name, row in rows.items():
        several = len(row["metrics"]) > 1
        lines.append(line(name, "mean" if several else next(iter(row["metrics"])), row))
        lines += [line("", metric, figure) for metric, figure in row["metrics"].items() if several]
        lines += [line(f"  {group}", "", part) for group, part in row["groups"].items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = 2  # columns of words; the rest are numbers
    text = [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in lines
    ]
    if results["glue_mean"] is not None:
        text.append(f"GLUE, mean of 11 numbers: {results['glue_mean']:.4f}")
    cut = [f"{row['truncated']:,} of {row['n']:,} in {name}" for name, row in rows.items() if row["truncated"]]
    text.append(f"sources cut at {results['max_source_length']} tokens: {', '.join(cut) or 'none'}")
    blind = [f"{row['unreadable']:,} of {row['n']:,} in {name}" for name, row in rows.items() if row["unreadable"]]
    lost = [f"{row['left_out']:,} in {name}" for name, row in rows.items() if row["left_out"]]
    if blind or lost:
        wrong = f"images, counted as wrong: {', '.join(blind) or 'none'}"
        text.append(f"unreadable {wrong}; texts, left out: {', '.join(lost) or 'none'}")
    counts = f"{results['trainable']:,} trainable of {results['total']:,} parameters"
    seconds = f"{results['seconds']:.0f} s, of which scoring {results['scoring_seconds']:.0f} s"
    return "\n".join([*text, f"{counts}; {results['split']} split; {seconds}"])


def _trained(run_dir: Path) -> float:
    """Seconds that the run's training took up to its newest checkpoint."""
    latest = run_dir / "LATEST"
    state = run_dir / latest.read_text().strip() / "state.json" if latest.is_file() else None
    return float(json.loads(state.read_text())["progress"]["seconds"]) if state and state.is_file() else 0.0


def _row(task: Task, samples: Sequence[Sample], texts: Sequence[str], train: Sequence[Sample]) -> dict[str, Any]:
    """One task of results.json: its score, each metric, what needs no model, and its groups."""
    asked = [sample.source for sample in samples]
    priors = (baselines.majority, baselines.source_prior) if train else ()
    guesses = [_measured(task, prior(*_texts(train), asked), samples) for prior in priors]
    prior = max(guesses, key=lambda rows: _mean(metrics.totals(rows)), default=None)
    labels_from_text = train and task.modality == "text" and (task.labels or "exact_match" in task.metrics)
    words = baselines.bag_of_words(*_texts(_some(train, WORDS_SAMPLES)), asked) if labels_from_text else None
    own = metrics.measure(task, texts, samples)

    def part(places: Sequence[int]) -> dict[str, Any]:
        here = list(places)
        mean, each = metrics.figures({m: rows[here] for m, rows in own.items()}, [samples[i].item for i in here])
        return {
            "metrics": {metric: figure._asdict() for metric, figure in each.items()},
            **mean._asdict(),
            "baseline": _mean(metrics.totals({m: rows[here] for m, rows in prior.items()})) if prior else None,
            "n": len(here),
        }

    groups = sorted({sample.group for sample in samples if sample.group is not None})
    return {
        **part(range(len(samples))),
        "bag_of_words": _mean(metrics.totals(_measured(task, words, samples))) if words else None,
        "groups": {group: part([i for i, s in enumerate(samples) if s.group == group]) for group in groups},
    }


def _contrast(task: Task, samples: Sequence[Sample], others: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The score under each control, None where it did not apply, and the number of samples asked."""
    scores = {
        f"shuffled_{name}": _mean(metrics.totals(_measured(task, texts, samples))) if texts else None
        for name, texts in others.items()
    }
    return {**scores, "shuffled_n": len(samples)} if others else {}


def _measured(task: Task, texts: Sequence[str], samples: Sequence[Sample]) -> dict[str, metrics.Rows]:
    """The rows of answers that may all be the same, as the majority's are, without a warning that says so."""
    with warnings.catch_warnings(action="ignore"):
        return metrics.measure(task, texts, samples)


def _texts(samples: Sequence[Sample]) -> tuple[list[str], list[str]]:
    return [sample.source for sample in samples], [sample.target for sample in samples]


def _some(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """`limit` samples drawn once and for all, or all if there are no more."""
    order = np.random.default_rng(0).permutation(len(samples))[:limit]
    return [samples[i] for i in sorted(order)]


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    return {metric: figure["score"] for metric, figure in row["metrics"].items()}


def _mean(scores: Mapping[str, float]) -> float:
    return float(np.mean(list(scores.values())))
