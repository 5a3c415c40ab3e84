"""Scores by generation: the validation of a running training, and the table of a finished run.

Every rank answers a share of the samples and all answers are gathered. This file must not know how a task judges an
answer (that is the task's) nor how the model was trained.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyperpelt_ds import dist, tasks
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Batch, Sample
from hyperpelt_ds.data.collate import Collator, collator_for
from hyperpelt_ds.data.loader import evaluation_batches, read_texts
from hyperpelt_ds.data.reader import Reader
from hyperpelt_ds.data.shards import Manifest
from hyperpelt_ds.model import HyperPELT, identity_of, load
from hyperpelt_ds.tasks import baselines, metrics
from hyperpelt_ds.train import engine

log = dist.logger(__name__)

SHUFFLED_SAMPLES = 500
"""At most so many samples of a task are answered under another task or image: a contrast needs no narrow interval."""


def validate(
    model: HyperPELT, manifest: Manifest, config: Config, split: str, limit: int
) -> dict[str, dict[str, float]]:
    """The mean of each task's metric over at most `limit` samples of `split` (0: all): task -> metric -> mean.

    Every rank calls it and gets the same result. The model must be in eval mode. A task without samples in the split is
    left out.
    """
    collator = collator_for(config, config.data.tasks, model.backbone.tokenizer)
    names = [name for name in config.data.tasks if manifest.count(name, split)]
    ranks = dist.rank(), dist.world_size()
    batches = evaluation_batches(manifest, split, names, collator, config.eval.batch_size, *ranks, limit)
    answers = _answer(model, batches, config)
    means: dict[str, dict[str, float]] = {}
    for name in names:
        task, own = tasks.get(name), [answer for answer in answers if answer[0].task == name]
        if own:
            scores = metrics.score(task, [text for _, text in own], [sample for sample, _ in own])
            means[name] = {task.metric: float(np.mean(scores))}
    return means


def mean_score(scores: Mapping[str, Mapping[str, float]]) -> float:
    """The mean over tasks of each task's mean over its metrics: what picks the best checkpoint."""
    return float(np.mean([np.mean(list(table.values())) for table in scores.values()]))


def evaluate(
    run_dir: str | Path, names: Sequence[str] | None = None, split: str = "test", out: str | Path | None = None
) -> dict[str, Any]:
    """Scores a run on all of `split`, prints the table and writes it to `out` (run_dir/results.json); returns it.

    Each task is answered three times: as it is, with every sample given another task of the run (how much the task
    embedding carries), and with every sample given another image of the task (how much the image carries). Works in one
    process and under a launcher, where only rank 0 has the scores. Raises ValueError for a folder that is no run, and
    for a task or split that it does not have.
    """
    start = time.monotonic()
    if out is not None and not Path(out).resolve().parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {Path(out).parent}")
    if dist.world_size() > 1:
        engine.start_distributed()
    run = load(run_dir, dist.device())
    config, model = run.config, run.model
    names = _known(names, config.data.tasks, run_dir)
    manifest = Manifest.load(config.data.manifest)
    if manifest.digest != identity_of(Path(run_dir))["manifest"]:
        raise ValueError(
            f"{run_dir} was trained on other data than {config.data.manifest} now holds: splits may differ"
        )
    collator = collator_for(config, config.data.tasks, model.backbone.tokenizer)
    reader = Reader(manifest)
    rows: dict[str, Any] = {}
    for name in names:
        samples = read_texts(manifest, name, split)
        if not samples:
            raise ValueError(f"task {name!r} has no split {split!r} in {config.data.manifest}")
        some = _some(samples, SHUFFLED_SAMPLES)
        asked = samples, _other_tasks(some, config.data.tasks), _other_images(some)
        texts = [_texts(_answer(model, _batches(a, reader, collator, config.eval.batch_size), config)) for a in asked]
        if dist.rank() == 0:
            rows[name] = _row(name, samples, some, texts, read_texts(manifest, name, "train"))
            log.info("%s: %s %.3f, %d samples", name, rows[name]["metric"], rows[name]["score"], len(samples))
    scoring = time.monotonic() - start
    results = {
        "tasks": rows,
        **model.parameter_counts(),
        "split": split,
        "seconds": _trained(Path(run_dir)) + scoring,
        "scoring_seconds": scoring,
    }
    if dist.rank() == 0:
        Path(out or Path(run_dir) / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(table(results), flush=True)
    return results


def table(results: Mapping[str, Any]) -> str:
    """The results as text: one line a task, its groups indented below it."""
    columns = ("baseline", "bag_of_words", "shuffled_task", "shuffled_image")
    lines = [["task", "metric", "score", "95 % interval", *(name.replace("_", " ") for name in columns), "n"]]
    for name, row in results["tasks"].items():
        for label, part in [(name, row), *((f"  {group}", part) for group, part in row["groups"].items())]:
            figures = [part.get(column) for column in columns]
            lines.append(
                [label, part.get("metric", ""), f"{part['score']:.3f}", f"{part['low']:.3f} to {part['high']:.3f}"]
                + ["" if figure is None else f"{figure:.3f}" for figure in figures]
                + [str(part["n"])]
            )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = 2  # columns of words; the rest are numbers
    text = [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    counts = f"{results['trainable']:,} trainable of {results['total']:,} parameters"
    seconds = f"{results['seconds']:.0f} s, of which scoring {results['scoring_seconds']:.0f} s"
    return "\n".join([*text, f"{counts}; {results['split']} split; {seconds}"])


def _trained(run_dir: Path) -> float:
    """Seconds that the run's training took up to its newest checkpoint."""
    latest = run_dir / "LATEST"
    state = run_dir / latest.read_text().strip() / "state.json" if latest.is_file() else None
    return float(json.loads(state.read_text())["progress"]["seconds"]) if state and state.is_file() else 0.0


def _row(
    name: str, samples: Sequence[Sample], some: Sequence[Sample], texts: Sequence[list[str]], train: Sequence[Sample]
) -> dict[str, Any]:
    """One task of results.json. `texts` answer `samples`, then `some` under other tasks and with other images."""
    task = tasks.get(name)
    as_is, other_task, other_image = texts
    plain = [s.source for s in train], [s.target for s in train], [s.source for s in samples]
    priors = [metrics.score(task, prior(*plain), samples) for prior in (baselines.majority, baselines.source_prior)]
    prior = max(priors, key=sum)
    labels_from_text = task.modality == "text" and task.metric == "exact_match"
    words = metrics.score(task, baselines.bag_of_words(*plain), samples) if labels_from_text else []
    scores = metrics.score(task, as_is, samples)

    def part(places: Sequence[int]) -> dict[str, Any]:
        own = [scores[i] for i in places]
        low, high = metrics.interval(own, [samples[i].item for i in places])
        return {
            "score": float(np.mean(own)),
            "low": low,
            "high": high,
            "baseline": float(np.mean([prior[i] for i in places])),
            "n": len(places),
        }

    groups = sorted({sample.group for sample in samples if sample.group is not None})
    return {
        "metric": task.metric,
        **part(range(len(samples))),
        "bag_of_words": float(np.mean(words)) if words else None,
        "shuffled_task": float(np.mean(metrics.score(task, other_task, some))) if other_task else None,
        "shuffled_image": float(np.mean(metrics.score(task, other_image, some))) if other_image else None,
        "shuffled_n": len(some),
        "groups": {group: part([i for i, s in enumerate(samples) if s.group == group]) for group in groups},
    }


def _answer(model: HyperPELT, batches: Iterable[Batch], config: Config) -> list[tuple[Sample, str]]:
    """What the model generates for the samples of all ranks' batches, in no particular order, on every rank."""
    found: list[tuple[Sample, str]] = []
    for batch in batches:
        ids = model.generate(batch.to(dist.device()), config.data.max_target_length, config.eval.num_beams)
        answers = zip(batch.samples, model.backbone.decode(ids), batch.loss_weights.tolist(), strict=True)
        found += [(sample, text) for sample, text, weight in answers if weight]
    return [answer for part in dist.gather(found) for answer in part]


def _batches(samples: Sequence[Sample], reader: Reader, collator: Collator, size: int) -> Iterator[Batch]:
    """This rank's share, of like length. A sample's key is its place in `samples`, whatever else was changed in it."""
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].source))
    for start in range(dist.rank() * size, len(order), dist.world_size() * size):
        chunk = [dataclasses.replace(samples[i], key=str(i)) for i in order[start : start + size]]
        yield collator(chunk, reader.images(chunk) if collator.grid else {}, [1.0] * len(chunk))


def _texts(answers: Sequence[tuple[Sample, str]]) -> list[str]:
    """The answers in the order of the samples that `_batches` was given."""
    return [text for _, text in sorted(answers, key=lambda answer: int(answer[0].key))]


def _some(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """`limit` samples drawn once and for all, or all if there are no more."""
    order = np.random.default_rng(0).permutation(len(samples))[:limit]
    return [samples[i] for i in sorted(order)]


def _other_tasks(samples: Sequence[Sample], names: Sequence[str]) -> list[Sample]:
    """Every sample under another task drawn uniformly from `names`; [] if there is no other."""
    others = [name for name in names if name != samples[0].task]
    if not others:
        return []
    draws = np.random.default_rng(0).integers(len(others), size=len(samples))
    return [dataclasses.replace(sample, task=others[draw]) for sample, draw in zip(samples, draws, strict=True)]


def _other_images(samples: Sequence[Sample]) -> list[Sample]:
    """Every sample with another image: one cycle through all of them, so that none keeps its own; [] without images."""
    images = sorted({sample.image for sample in samples if sample.image is not None})
    if len(images) < 2:
        return []
    cycle = np.random.default_rng(0).permutation(images).tolist()
    following = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    return [dataclasses.replace(s, image=following[s.image]) if s.image is not None else s for s in samples]


def _known(names: Sequence[str] | None, tasks_of_run: Sequence[str], run_dir: str | Path) -> Sequence[str]:
    for name in names or ():
        if name not in tasks_of_run:
            near = difflib.get_close_matches(name, tasks_of_run, 3, 0.4) or tasks_of_run
            raise ValueError(f"task {name!r} is not one of {run_dir}; did you mean {', '.join(near)}?")
    return names or tasks_of_run
