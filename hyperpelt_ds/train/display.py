"""What a look at the model and a validation's answers become for people: histograms, figures, texts and embeddings.

It must not know when anything is shown, nor how it was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hyperpelt_ds.train import figures, samples
from hyperpelt_ds.train.metrics import SAMPLES, Writer
from hyperpelt_ds.train.observation import MATRIX_TASKS, Observation
from hyperpelt_ds.train.samples import Answer


def show_look(writer: Writer, seen: Observation) -> None:
    """Histograms, figures and embeddings of a look, under its step."""
    writer.show(seen.step, histograms=seen.numbers, images=_figures(seen))
    for name, embedding in seen.embeddings.items():
        writer.project(name, embedding.columns, embedding.labels, embedding.points)


def show_answers(
    writer: Writer, run_dir: Path, pictures: Path, step: int, turn: int, answers: Sequence[Answer]
) -> None:
    """Some of a validation's answers, those of its `turn`; `pictures` is a folder of files named by image ids."""
    chosen = samples.choose(answers, turn)
    kept = samples.keep_pictures(chosen, pictures, run_dir)
    writer.append(SAMPLES, samples.lines(step, chosen, kept))
    writer.show(
        step,
        images={f"samples/{task}": image for task, image in samples.drawings(chosen, kept, run_dir).items()},
        texts={f"samples/{task}": text for task, text in samples.texts(chosen).items()},
    )


def _figures(seen: Observation) -> dict[str, np.ndarray]:
    record, at = seen.record, f"step {seen.step}"
    tasks = record["tasks"]
    found: dict[str, np.ndarray] = {}
    if len(tasks) > MATRIX_TASKS:  # thousands of pixels a side, and minutes to draw
        return found
    for kind, of in record.get("gradients", {}).items():
        title = f"gradients of {kind} weights: cosine between tasks, {at}"
        found[f"gradients/cosine_{kind}"] = figures.heat_map(title, tasks, tasks, of["cosines"], signed=True)
    for kind, of in record.get("weights", {}).items():
        title = f"generated {kind} weights: cosine between tasks, {at}"
        found[f"weights/cosine_{kind}"] = figures.heat_map(title, tasks, tasks, of["cosines"], signed=True)
        title = f"generated {kind} weights: norm, {at}"
        found[f"weights/norm_{kind}"] = figures.heat_map(title, tasks, record["layers"], of["norms"], signed=False)
    for name, of in record.get("hyper_embeddings", {}).items():
        title = f"hyper-embeddings from {name}: cosine between tasks, {at}"
        found[f"hyper_embeddings/cosine_{name}"] = figures.heat_map(title, tasks, tasks, of["cosines"], signed=True)
    if "prefix_share" in record:
        blocks = record["prefix_share"]
        values = [list(row) for row in zip(*blocks.values(), strict=True)]
        title = f"share of attention that prefixes get, {at}"
        found["prefix_share"] = figures.heat_map(title, tasks, list(blocks), values, signed=False)
    if "mixture" in record:
        found["mixture"] = figures.bars(f"samples by task, up to {at}", tasks, record["mixture"])
    return found
