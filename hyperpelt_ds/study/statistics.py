"""Differences between methods, with intervals over test items and seeds.

Knows arrays of scores only: no records, no names of methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Scores = Mapping[str, np.ndarray]
"""task -> (seeds, N) scores of single answers."""


class Figure(NamedTuple):
    """An estimate and its interval."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Resamples of the test items, drawn once, so that all methods meet the same ones.

    `items`: task -> for each of its samples a number that names its item; equal numbers, in whatever task, are drawn
    together, since answers about one sentence or image are not independent.
    """

    def __init__(self, items: Mapping[str, Sequence[int]], draws: int, confidence: float, seed: int = 0) -> None:
        self.draws, self._seed = draws, seed
        self._percentiles = [50 * (1 - confidence), 50 * (1 + confidence)]
        count = 1 + max(max(own) for own in items.values())
        times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
        self._weights = {}
        for task, own in items.items():
            weights = times[:, np.asarray(own)].astype(np.float32)  # (draws, N)
            self._weights[task] = weights / np.maximum(weights.sum(1, keepdims=True), 1)

    def mean(self, scores: Scores) -> Figure:
        """The mean over tasks of a method's mean over seeds and samples."""
        return self._figure(point(scores), self._means(scores, 0))

    def difference(self, scores: Scores, other: Scores) -> Figure:
        """How much higher the mean of `scores` is than that of `other`: items are paired, seeds are not."""
        return self._figure(point(scores) - point(other), self._means(scores, 1) - self._means(other, 2))

    def _means(self, scores: Scores, stream: int) -> np.ndarray:
        """(draws,) means of resampled seeds and items; all tasks of a seed are drawn together, they are one run."""
        seeds = {len(own) for own in scores.values()}
        assert len(seeds) == 1, f"tasks of different numbers of seeds: {seeds}"
        count = seeds.pop()
        random = np.random.default_rng([self._seed, stream])
        times = random.multinomial(count, np.full(count, 1 / count), size=self.draws) / count  # (draws, seeds)
        means = [((self._weights[task] @ own.T.astype(np.float32)) * times).sum(1) for task, own in scores.items()]
        return np.mean(means, axis=0)

    def _figure(self, value: float, drawn: np.ndarray) -> Figure:
        low, high = np.percentile(drawn, self._percentiles)
        return Figure(value, float(low), float(high))


def point(scores: Scores) -> float:
    """The mean over tasks of the mean over seeds and samples."""
    return float(np.mean([own.mean() for own in scores.values()]))


def verdict(difference: Figure, margin: float) -> str:
    """What a difference counts as: better, not worse, worse or undecided (docs/study.md)."""
    if difference.value >= margin and difference.low > 0:
        return "better"
    if difference.low > -margin:
        return "not worse"
    if difference.value <= -margin and difference.high < 0:
        return "worse"
    return "undecided"


def interval(figure: Figure, signed: bool = False) -> str:
    """An estimate and its interval as text."""
    sign = "+" if signed else ""
    return f"{figure.value:{sign}.3f} [{figure.low:{sign}.3f}, {figure.high:{sign}.3f}]"
