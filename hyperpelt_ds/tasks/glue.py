"""The eight GLUE tasks of the paper's table, on the examples of the Hugging Face data set `nyu-mll/glue`.

Fields are those of its configurations (sentence; sentence1 and sentence2; ...), `label` is its number, and -1 (the
official test sets) gives no sample. A builder that wants the official test sets for a submission renders them with any
label and keeps only the source. Sources and targets are as in HyperFormer, which the paper compares with, but for two
slips of its code: MNLI's second colon is there, and STS-B's targets lie on the 0.2 grid of its own label list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from hyperpelt_ds.tasks.task import Example, Task, classify, prompt

_TERMS = "GLUE (Wang et al. 2018); each data set under its own terms"
STSB_TOP, STSB_STEPS = 5, 5  # similarities from 0 to 5, in five steps a unit
STSB_LABELS = tuple(f"{step / STSB_STEPS:.1f}" for step in range(STSB_TOP * STSB_STEPS + 1))


def _similarity(example: Example) -> tuple[str, str] | None:
    """sentence1, sentence2, label (0..5, or -1 for none): the label rounded to the grid, half steps to even."""
    label = example["label"]
    if label == -1:
        return None
    if not 0 <= label <= STSB_TOP:
        raise ValueError(f"label {label!r} is not between 0 and {STSB_TOP}, or -1 for none")
    return prompt(example, ("sentence1", "sentence2")), STSB_LABELS[round(label * STSB_STEPS)]


GLUE = (
    Task(
        "glue_cola",
        "text",
        ("mcc",),
        f"is a sentence acceptable English; CoLA, {_TERMS}",
        "Decide whether the sentence is grammatically acceptable English: 1 if it is, 0 if it is not.",
        classify("sentence", classes=2),
        labels=("0", "1"),
    ),
    Task(
        "glue_sst2",
        "text",
        ("accuracy",),
        f"positive or negative opinion of a film; SST-2, {_TERMS}",
        "Decide whether the opinion of the film is positive: 1 if it is positive, 0 if it is negative.",
        classify("sentence", classes=2),
        labels=("0", "1"),
    ),
    Task(
        "glue_mrpc",
        "text",
        ("accuracy", "f1"),
        f"do two sentences from the news say the same; MRPC, {_TERMS}",
        "Decide whether the two sentences say the same: 1 if they do, 0 if they do not.",
        classify("sentence1", "sentence2", classes=2),
        labels=("0", "1"),
    ),
    Task(
        "glue_qqp",
        "text",
        ("accuracy", "f1"),
        f"do two questions ask the same; QQP, {_TERMS}",
        "Decide whether the two questions ask for the same thing: 1 if they do, 0 if they do not.",
        classify("question1", "question2", classes=2),
        labels=("0", "1"),
    ),
    Task(
        "glue_stsb",
        "text",
        ("pearson", "spearman"),
        f"how alike are two sentences; STS-B, {_TERMS}",
        "Rate how alike the two sentences are in meaning, from 0.0 for not at all to 5.0 for the same.",
        _similarity,
        parse=str.strip,
        labels=STSB_LABELS,
    ),
    Task(
        "glue_mnli",
        "text",
        ("accuracy",),
        f"does the premise entail the hypothesis; MNLI, {_TERMS}",
        "Decide whether the premise entails the hypothesis (0), leaves it open (1) or contradicts it (2).",
        classify("premise", "hypothesis", classes=3),
        labels=("0", "1", "2"),
    ),
    Task(
        "glue_qnli",
        "text",
        ("accuracy",),
        f"does a sentence of Wikipedia answer the question; QNLI, {_TERMS}",
        "Decide whether the sentence holds the answer to the question: 0 if it does, 1 if it does not.",
        classify("question", "sentence", classes=2),
        labels=("0", "1"),
    ),
    Task(
        "glue_rte",
        "text",
        ("accuracy",),
        f"does the first sentence entail the second; RTE, {_TERMS}",
        "Decide whether the second sentence follows from the first: 0 if it does, 1 if it does not.",
        classify("sentence1", "sentence2", classes=2),
        labels=("0", "1"),
    ),
)


def halves(examples: int, seed: int = 42) -> tuple[list[int], list[int]]:
    """The rows of a development set of so many examples that are for validation and for test, drawn at random.

    How the paper makes both from CoLA, MRPC, STS-B and RTE, which have no labelled test set: 521 and 522, 204 and 204,
    750 and 750, 138 and 139. The draw is that of HyperFormer's code, with its seed; the paper's own is not known.
    """
    import torch  # takes seconds, and most who name a task draw nothing

    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[: examples // 2]), sorted(order[examples // 2 :])


def mean(scores: Mapping[str, Mapping[str, float]]) -> float | None:
    """GLUE's mean of eleven numbers: every metric of every task counts once, so MRPC, QQP and STS-B count twice.

    scores: task -> metric -> score. None unless all eight tasks are there.
    """
    if not all(task.name in scores for task in GLUE):
        return None
    return float(np.mean([scores[task.name][metric] for task in GLUE for metric in task.metrics]))


class Leaderboard(NamedTuple):
    """How the server wants a task: the name of its file, and the word for each label (none for STS-B's numbers)."""

    file: str
    words: tuple[str, ...]


LEADERBOARD = {
    "glue_cola": Leaderboard("CoLA", ("0", "1")),
    "glue_sst2": Leaderboard("SST-2", ("0", "1")),
    "glue_mrpc": Leaderboard("MRPC", ("0", "1")),
    "glue_qqp": Leaderboard("QQP", ("0", "1")),
    "glue_stsb": Leaderboard("STS-B", ()),
    "glue_mnli": Leaderboard("MNLI-m", ("entailment", "neutral", "contradiction")),
    "glue_qnli": Leaderboard("QNLI", ("entailment", "not_entailment")),
    "glue_rte": Leaderboard("RTE", ("entailment", "not_entailment")),
}


def leaderboard_file(task: str, split: str) -> str:
    """The server's name for a task's file; MNLI has two test sets, told apart by the name of the split."""
    return "MNLI-mm" if task == "glue_mnli" and "mismatched" in split else LEADERBOARD[task].file
