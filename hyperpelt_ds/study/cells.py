"""One run of the plan: train it as `launch/train.py` would, answer the test split, keep a score for every answer.

This file must not know what a cell is compared with, nor which others there are.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyperpelt_ds import tasks
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.data.reader import Reader
from hyperpelt_ds.model import Predictor, load
from hyperpelt_ds.study import plan
from hyperpelt_ds.study.plan import Cell
from hyperpelt_ds.tasks import metrics
from hyperpelt_ds.train import loop, transfer
from hyperpelt_ds.train.answering import answers, asker, split_samples
from hyperpelt_ds.train.controls import CONTROLS

SPLIT = "test"
STEP = 200
"""Scores of single answers are kept in 1/200, so that one fits into a byte."""

Record = dict[str, Any]


def run(cell: Cell, folder: Path) -> Record:
    """Trains the cell in folder/NAME and scores it; a killed one starts again, one whose training is done does not.

    The cell that it starts from must have been run in the same folder.
    """
    began = time.process_time()
    run_dir = folder / cell.name
    trained = loop.train(configured(cell, folder), plan.DS_CONFIG, run_dir, resume=True)
    parameters = trained.parameter_counts()
    record: Record = {
        "cell": cell.name,
        "settings": list(cell.settings),
        "validation": _validation(run_dir),
        "trainable": parameters["trainable"],
        "train_cpu_seconds": round(time.process_time() - began, 1),
        "scores": {},
        "controls": {},
    }
    if cell.scored:
        predictor = load(run_dir)
        for name in cell.scored if cell.describes else ():
            predictor.describe_task(name, tasks.get(name).description)
        manifest = Manifest.of(predictor.config.data)
        for name in cell.scored:
            samples = test_samples(manifest, name)
            record["scores"][name] = pack(_scores(predictor, manifest, name, samples))
            record["controls"][name] = _under_controls(predictor, manifest, name, samples, cell.controls)
    record["cpu_seconds"] = round(time.process_time() - began, 1)
    return record


def configured(cell: Cell, folder: Path) -> Config:
    """The cell's configuration: the recipe's, or that of the run that it starts from, with its settings."""
    if not cell.start:
        return plan.base().override(cell.settings)
    return transfer.from_run(folder / cell.start, [cell.new_task], None, cell.train).override(cell.settings)


def test_samples(manifest: Manifest, task: str) -> list[Sample]:
    """The samples of a task that every cell is scored on, in a fixed order."""
    samples, damaged = split_samples(manifest, task, SPLIT)
    if damaged:
        raise ValueError(f"a study needs whole data, but {len(damaged)} samples of {task}/{SPLIT} cannot be read")
    return samples_of(samples, plan.TEST_SAMPLES)


def samples_of(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """`limit` of the samples, drawn once and for all."""
    places = np.random.default_rng(0).permutation(len(samples))[:limit]
    return [samples[place] for place in sorted(places)]


def pack(scores: Iterable[float]) -> str:
    """Scores from 0 to 1 as text, a byte each."""
    return base64.b64encode(np.round(np.array(list(scores)) * STEP).astype(np.uint8).tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    """(N,) scores that `pack` wrote."""
    return np.frombuffer(base64.b64decode(text), np.uint8) / STEP


def _validation(run_dir: Path) -> float:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return next(line["eval/mean"] for line in reversed(lines) if "eval/mean" in line)


def _scores(run: Predictor, manifest: Manifest, task: str, samples: Sequence[Sample]) -> np.ndarray:
    """(N,): what the task's one metric gives for each answer."""
    texts = answers(samples, asker(run, Reader(manifest)), run.config.eval.batch_size)
    return judged(task, [text or "" for text in texts], samples)


def judged(task: str, texts: Sequence[str], samples: Sequence[Sample]) -> np.ndarray:
    """(N,) scores of single answers; ValueError for a task whose score is no mean over answers."""
    rows = metrics.measure(tasks.get(task), texts, samples)
    if len(rows) != 1 or (own := next(iter(rows.values()))).shape[1] != 1:
        raise ValueError(f"task {task!r}: a study needs a task with one metric that is a mean over answers")
    return own[:, 0]


def _under_controls(
    run: Predictor, manifest: Manifest, task: str, samples: Sequence[Sample], controls: Sequence[str]
) -> Mapping[str, str]:
    """The scores under each control that applies, and without any for the same samples."""
    some = samples_of(samples, plan.CONTROL_SAMPLES)
    found = {}
    for control in controls:
        with CONTROLS[control](run, some) as asked:
            if asked:
                texts = answers(asked, asker(run, Reader(manifest)), run.config.eval.batch_size)
                found[control] = pack(judged(task, [text or "" for text in texts], some))
    return found


def fingerprint(cell: Cell) -> list[Any]:
    """What a record must have been made with to be this cell's."""
    return [list(cell.settings), list(cell.scored), list(cell.controls), cell.start, cell.new_task, cell.describes]
