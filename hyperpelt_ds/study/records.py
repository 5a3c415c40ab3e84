"""Which records belong together: the seeds of a method, the form that it is judged by, the ways of the image.

This file must not know what is written about them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from hyperpelt_ds.study import plan
from hyperpelt_ds.study.cells import Record, unpack
from hyperpelt_ds.study.plan import METHODS, core_name
from hyperpelt_ds.study.statistics import Scores, point

Records = Mapping[str, Record]
VISION_TASKS = ("easy_vqa", "shape_caption")


def validation(records: Records) -> dict[str, float]:
    """Validation scores of the recorded cells."""
    return {name: record["validation"] for name, record in records.items() if "validation" in record}


def scores_of(records: Records, names: Iterable[str], tasks: Sequence[str] = plan.TASKS) -> Scores | None:
    """task -> (seeds, N) of the named cells; None if one of them is missing."""
    found = [records.get(name) for name in names]
    if not found or any(record is None for record in found):
        return None
    return {task: np.stack([unpack(record["scores"][task]) for record in found if record]) for task in tasks}


def recorded(records: Records, names: Sequence[str]) -> list[str]:
    return [name for name in names if name in records]


def seeds_of(method: str, named: bool) -> list[str]:
    """The cells of a method in one form."""
    own = METHODS[method]
    natural = named != own.knows_task
    return [core_name(method, named, seed) for seed in range(own.seeds if natural else plan.OTHER_SEEDS)]


def judged_form(records: Records, method: str) -> bool | None:
    """Whether the method is judged with its task named: the form with the higher mean validation score of those that
    were run; None if neither was run whole."""
    means = {}
    for named in (False, True):
        names = seeds_of(method, named)
        if all(name in records for name in names):
            means[named] = statistics.mean(records[name]["validation"] for name in names)
    return max(means, key=lambda named: means[named]) if means else None


def image_scores(records: Records) -> dict[str, float]:
    """How the image enters -> the mean score of the tasks with images, for the ways that were run."""
    ways = {"weights": [core_name(plan.OWN, False, seed) for seed in range(plan.SEEDS)]}
    ways |= {way: [f"image/{way}/seed{seed}" for seed in range(plan.SEEDS)] for way in plan.IMAGE_WAYS}
    found = {way: scores_of(records, recorded(records, names), VISION_TASKS) for way, names in ways.items()}
    return {way: point(scores) for way, scores in found.items() if scores}
