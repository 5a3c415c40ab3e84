"""Rows of the results that no model makes: what the data gives away without one, and what a question alone allows.

This file must not know any run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hyperpelt_ds.contracts import TRAIN, Sample
from hyperpelt_ds.data.evaluation import read_texts
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.study import cells
from hyperpelt_ds.tasks import baselines

NAME = "references"
TITLES = {
    "majority": "majority answer",
    "source_prior": "majority answer of the same source",
    "bag_of_words": "bag of words",
}
ORACLE = ("easy_vqa", "shape_caption")
"""The task whose answers follow from question, colour and shape, and the one on the same images that tells these."""
TOLD = ("question", "question, colour", "question, shape", "question, colour, shape")


def measure(manifest: Manifest, tasks: Sequence[str]) -> dict[str, Any]:
    """{"cell": NAME, "scores": {reference: {task: packed scores}}}, on the samples that cells are scored on."""
    found: dict[str, dict[str, str]] = {name: {} for name in TITLES}
    for task in tasks:
        train, test = read_texts(manifest, task, TRAIN), cells.test_samples(manifest, task)
        for name in TITLES:
            guess: Callable[..., list[str]] = getattr(baselines, name)
            answers = guess([s.source for s in train], [s.target for s in train], [s.source for s in test])
            found[name][task] = cells.pack(cells.judged(task, answers, test))
    return {"cell": NAME, "scores": found | {"oracle": _oracle(manifest) if set(ORACLE) <= set(tasks) else {}}}


def _oracle(manifest: Manifest) -> dict[str, str]:
    """What is told -> packed scores of the most frequent training answer to it. Colour and shape of an image are those
    of its caption; the one image in ten that has none is told apart from no other such."""
    task, telling = ORACLE
    captions = [sample for split in (TRAIN, cells.SPLIT) for sample in read_texts(manifest, telling, split)]
    facts = {sample.item: sample.target.split()[1:] for sample in captions}

    def told(sample: Sample) -> dict[str, str]:
        colour, shape = facts.get(sample.item, ("", ""))
        parts = (sample.source, f"{sample.source} {colour}", f"{sample.source} {shape}")
        return dict(zip(TOLD, (*parts, f"{sample.source} {colour} {shape}"), strict=True))

    train, test = read_texts(manifest, task, TRAIN), cells.test_samples(manifest, task)
    found = {}
    for name in TOLD:
        seen, asked = [told(sample)[name] for sample in train], [told(sample)[name] for sample in test]
        answers = baselines.source_prior(seen, [sample.target for sample in train], asked)
        found[name] = cells.pack(cells.judged(task, answers, test))
    return found
