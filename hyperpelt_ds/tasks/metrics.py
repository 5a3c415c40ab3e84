"""Scores of answers, and intervals for them.

A metric says what each sample contributes (a row of numbers) and how rows make a score, so that slices, paired tests
and intervals can be made of the rows later, for means and for what is no mean (correlations, F1, BLEU) alike. Every
score is on a scale where 1 is what papers print as 100; only CIDEr can exceed it. This file must not know where answers
come from: a model's, a baseline's and a shuffled run's are scored alike.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import sacrebleu
import scipy.stats
import sklearn.metrics
from pycocoevalcap.cider.cider import Cider

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.tasks.task import NUMERIC, Task, check_target
from hyperpelt_ds.tasks.vqa_accuracy import PEOPLE_FOR_CERTAIN, vqa_accuracy

UNREADABLE = -1.0
"""The number, or class, of an answer that is none. HyperFormer, like T5 before it, takes -1 for such a similarity: off
the scale of 0 to 5, so that it costs."""

Rows = np.ndarray
"""(n, k) float64: what each of n samples contributes to one metric."""


class Metric(NamedTuple):
    """`total` gives the score of rows (n, k) of which row i is taken counts[i] times; NaN where it is undefined."""

    rows: Callable[[Task, Sequence[str], Sequence[Sample]], Rows]
    total: Callable[[Rows, np.ndarray], float]


class Figure(NamedTuple):
    """A score and the ends of its 95 % interval."""

    score: float
    low: float
    high: float


def measure(task: Task, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, Rows]:
    """The rows of each of the task's metrics, one a sample.

    Raises ValueError naming the sample for a target that is none of the task's labels, and for a metric that needs
    references where there are none; ValueError naming the task if there are no samples.
    """
    if not samples:
        raise ValueError(f"task {task.name!r}: no samples to score")
    if len(predictions) != len(samples):
        raise ValueError(f"task {task.name!r}: {len(predictions)} predictions for {len(samples)} samples")
    for sample in samples:
        check_target(task, sample.key, sample.target)
    return {name: METRICS[name].rows(task, predictions, samples) for name in task.metrics}


def totals(rows: Mapping[str, Rows]) -> dict[str, float]:
    """The score of each metric's rows; 0 where it is undefined (a correlation with a constant)."""
    return {name: _total(METRICS[name], own, np.ones(len(own))) for name, own in rows.items()}


def score(task: Task, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    """The task's metrics for predictions of samples, by name; raises ValueError as `measure` does."""
    return totals(measure(task, predictions, samples))


def figures(
    rows: Mapping[str, Rows], items: Sequence[str], draws: int = 2000, seed: int = 0
) -> tuple[Figure, dict[str, Figure]]:
    """The mean over metrics and each metric, with 95 % percentile intervals by bootstrap over items.

    Samples of one item (questions about one image) are drawn together: they are not independent, and taking them as
    such would make the interval too narrow.
    """
    if not items:
        raise ValueError("no scores to make an interval of")
    scores = totals(rows)
    drawn = {name: _resampled(METRICS[name], own, items, draws, seed) for name, own in rows.items()}

    def figure(score: float, values: np.ndarray) -> Figure:
        low, high = np.percentile(values, [2.5, 97.5])
        return Figure(score, float(low), float(high))

    mean = figure(float(np.mean(list(scores.values()))), np.mean(list(drawn.values()), axis=0))
    return mean, {name: figure(scores[name], drawn[name]) for name in rows}


def _resampled(metric: Metric, rows: Rows, items: Sequence[str], draws: int, seed: int) -> np.ndarray:
    """(draws,) scores. Equal rows are counted, not repeated: a mean of right and wrong, or a confusion matrix, costs
    the same for 100 and for 100,000 samples."""
    distinct, kind = np.unique(rows, axis=0, return_inverse=True)
    places = {item: place for place, item in enumerate(dict.fromkeys(items))}
    place = np.array([places[item] for item in items])
    even = np.full(len(places), 1 / len(places))
    random = np.random.default_rng(seed)
    scores = np.empty(draws)
    for draw in range(draws):
        times = random.multinomial(len(places), even)
        counts = np.bincount(kind.ravel(), weights=times[place], minlength=len(distinct))
        scores[draw] = _total(metric, distinct, counts)
    return scores


def _total(metric: Metric, rows: Rows, counts: np.ndarray) -> float:
    value = float(metric.total(rows, counts))
    return 0.0 if math.isnan(value) else value


# What samples contribute


def _each(compare: Callable[[str, str], float]) -> Callable[[Task, Sequence[str], Sequence[Sample]], Rows]:
    """A comparison of one prediction with one answer, both as the task parses them; the best over the references, where
    a sample has any."""

    def rows(task: Task, predictions: Sequence[str], samples: Sequence[Sample]) -> Rows:
        pairs = zip(predictions, samples, strict=True)
        return _column(
            [
                max(compare(task.parse(text), task.parse(answer)) for answer in sample.references or (sample.target,))
                for text, sample in pairs
            ]
        )

    return rows


def exact_match(prediction: str, target: str) -> float:
    return float(prediction == target)


def token_f1(prediction: str, target: str) -> float:
    """F1 of the two bags of words; 1 if both are empty."""
    found, wanted = prediction.split(), target.split()
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def _gqa_rows(task: Task, predictions: Sequence[str], samples: Sequence[Sample]) -> Rows:
    """Right or wrong by the very words, as GQA's own script has it; only case and spaces are overlooked."""
    pairs = zip(predictions, samples, strict=True)
    return _column([text.casefold().split() == sample.target.casefold().split() for text, sample in pairs])


def _class_rows(task: Task, predictions: Sequence[str], samples: Sequence[Sample]) -> Rows:
    """(predicted, true) class numbers; UNREADABLE for a prediction that is no label."""
    assert task.labels, f"task {task.name!r} has a metric of classes and names none"
    numbers = {task.parse(label): float(number) for number, label in enumerate(task.labels)}
    found = [numbers.get(task.parse(text), UNREADABLE) for text in predictions]
    return np.stack([found, [numbers[task.parse(sample.target)] for sample in samples]], axis=1)


def _number_rows(task: Task, predictions: Sequence[str], samples: Sequence[Sample]) -> Rows:
    """(predicted, true) numbers."""
    found, wanted = [number(text) for text in predictions], [number(sample.target) for sample in samples]
    if len(set(found)) == 1 or len(set(wanted)) == 1:
        which = "predictions" if len(set(found)) == 1 else "targets"
        warnings.warn(
            f"task {task.name!r}: all {len(found)} {which} are the same number, its correlations count as 0",
            stacklevel=2,
        )
    return np.stack([found, wanted], axis=1)


def number(text: str) -> float:
    """The number that a text is; UNREADABLE if it is none, or not finite."""
    try:
        value = float(text)
    except ValueError:
        return UNREADABLE
    return value if math.isfinite(value) else UNREADABLE


def check_answer(metrics: Sequence[str], target: str, references: Sequence[str]) -> None:
    """Raises ValueError for a stored target or references that one of the metrics cannot compare with."""
    numeric = [name for name in NUMERIC if name in metrics]
    if numeric:
        try:
            readable = math.isfinite(float(target))
        except ValueError:
            readable = False
        if not readable:
            raise ValueError(f"metric {numeric[0]!r} compares numbers, such as 3.5, got {target!r}")
    if "vqa_accuracy" in metrics and len(references) <= PEOPLE_FOR_CERTAIN:
        raise ValueError(
            f"metric 'vqa_accuracy' compares with the answers of many people, more than {PEOPLE_FOR_CERTAIN}, got "
            f"{len(references)} references"
        )


def _vqa_rows(task: Task, predictions: Sequence[str], samples: Sequence[Sample]) -> Rows:
    for sample in samples:
        if len(sample.references) <= PEOPLE_FOR_CERTAIN:
            raise ValueError(
                f"metric 'vqa_accuracy' of task {task.name!r} compares with the answers of many people (the data sets "
                f"have ten), but sample {sample.key!r} has {len(sample.references)} references"
            )
    pairs = zip(predictions, samples, strict=True)
    return _column([vqa_accuracy(text, sample.references) for text, sample in pairs])


def _references(metric: str, task: Task, sample: Sample) -> list[str]:
    """The texts to compare with, as words: the references, or the target where it is the only one."""
    texts = [caption_words(text) for text in sample.references or (sample.target,)]
    if not any(texts):
        raise ValueError(f"metric {metric!r} of task {task.name!r}: sample {sample.key!r} has no references")
    return texts


_WORD = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\d+(?:[.,:/]\d+)+|\w+(?:[-/]\w+)*")


def caption_words(text: str) -> str:
    """A caption's words with single spaces, nearly as COCO's tools have them from a Java program, the Penn Treebank's
    tokenizer: lower case, no punctuation, clitics apart, numbers, times and words with hyphens whole. "A man's T-shirt
    isn't $5.99." becomes "a man 's t-shirt is n't 5.99"."""
    text = re.sub(r"(\w)(n't|'(?:s|re|ve|ll|d|m))\b", r"\1 \2", text.lower().replace("\u2019", "'"))
    return " ".join(_WORD.findall(text))


_BLEU = sacrebleu.BLEU(tokenize="none", force=True, effective_order=True)  # counts n-grams; `_bleu` scores them


def _bleu_rows(task: Task, predictions: Sequence[str], samples: Sequence[Sample]) -> Rows:
    """Matches and numbers of 1- to 4-grams, words, and words of the reference nearest in length."""
    counts = []
    for text, sample in zip(predictions, samples, strict=True):
        found = _BLEU.sentence_score(caption_words(text), _references("bleu4", task, sample))
        counts.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    return np.array(counts, dtype=float)


def _cider_rows(task: Task, predictions: Sequence[str], samples: Sequence[Sample]) -> Rows:
    """CIDEr-D of each caption; rare words are those of few of the samples here."""
    wanted = {place: _references("cider", task, sample) for place, sample in enumerate(samples)}
    found = {place: [caption_words(text)] for place, text in enumerate(predictions)}
    return _column(Cider().compute_score(wanted, found)[1])


def _column(values: Sequence[float]) -> Rows:
    return np.asarray(values, dtype=float).reshape(-1, 1)


# How rows make a score


def _mean(rows: Rows, counts: np.ndarray) -> float:
    return float(counts @ rows[:, 0] / counts.sum())


def _f1(rows: Rows, counts: np.ndarray) -> float:
    """F1 of the second of two classes. An unreadable answer counts as the wrong class, as in T5's and HyperFormer's
    metric: it would otherwise be no false positive."""
    found = np.where(rows[:, 0] == UNREADABLE, 1 - rows[:, 1], rows[:, 0])
    return float(sklearn.metrics.f1_score(rows[:, 1], found, pos_label=1, sample_weight=counts, zero_division=0))


def _matthews(rows: Rows, counts: np.ndarray) -> float:
    """Matthews' correlation; an unreadable answer is one class more, as in HyperFormer's."""
    return float(sklearn.metrics.matthews_corrcoef(rows[:, 1], rows[:, 0], sample_weight=counts))


def _correlation(correlate: Callable[..., tuple[float, float]]) -> Callable[[Rows, np.ndarray], float]:
    def total(rows: Rows, counts: np.ndarray) -> float:
        drawn = np.repeat(rows, counts.astype(int), axis=0)
        if (np.ptp(drawn, axis=0) == 0).any():
            return math.nan  # which scipy would return with a warning for every draw
        return float(correlate(drawn[:, 0], drawn[:, 1])[0])

    return total


def _bleu(rows: Rows, counts: np.ndarray) -> float:
    """Corpus BLEU-4 without smoothing, COCO's convention, on a scale of 0 to 1."""
    *grams, words, nearest = (counts @ rows).astype(int).tolist()
    found = sacrebleu.BLEU.compute_bleu(grams[:4], grams[4:], words, nearest, smooth_method="none")
    return found.score / 100


METRICS = {
    "exact_match": Metric(_each(exact_match), _mean),
    "token_f1": Metric(_each(token_f1), _mean),
    "accuracy": Metric(_each(exact_match), _mean),  # the field's name for it where answers are classes
    "f1": Metric(_class_rows, _f1),
    "mcc": Metric(_class_rows, _matthews),
    "pearson": Metric(_number_rows, _correlation(scipy.stats.pearsonr)),
    "spearman": Metric(_number_rows, _correlation(scipy.stats.spearmanr)),
    "vqa_accuracy": Metric(_vqa_rows, _mean),
    "gqa_accuracy": Metric(_gqa_rows, _mean),
    "bleu4": Metric(_bleu_rows, _bleu),
    "cider": Metric(_cider_rows, _mean),
}
