"""Scores per sample, and an interval for their mean.

One number in 0..1 for each answer, so that slices, paired tests and intervals can be made of them later. This file
must not know where answers come from: a model's, a baseline's and a shuffled run's are scored alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.tasks.task import Task


def score(task: Task, predictions: Sequence[str], samples: Sequence[Sample]) -> list[float]:
    """The task's metric for each prediction against its sample's target, both read by `task.parse`."""
    measure = METRICS[task.metric]
    return [
        measure(task.parse(text), task.parse(sample.target)) for text, sample in zip(predictions, samples, strict=True)
    ]


def exact_match(prediction: str, target: str) -> float:
    return float(prediction == target)


def token_f1(prediction: str, target: str) -> float:
    """F1 of the two bags of words; 1 if both are empty."""
    found, wanted = prediction.split(), target.split()
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


METRICS = {"exact_match": exact_match, "token_f1": token_f1}


def interval(scores: Sequence[float], items: Sequence[str], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean score, by bootstrap over items.

    Samples of one item (questions about one image) are drawn together: they are not independent, and taking them as
    such would make the interval too narrow.
    """
    if not scores:
        raise ValueError("no scores to make an interval of")
    rows = {item: row for row, item in enumerate(dict.fromkeys(items))}
    totals, counts = np.zeros(len(rows)), np.zeros(len(rows))
    for value, item in zip(scores, items, strict=True):
        totals[rows[item]] += value
        counts[rows[item]] += 1
    times = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=draws)
    low, high = np.percentile((times @ totals) / (times @ counts), [2.5, 97.5])
    return float(low), float(high)
