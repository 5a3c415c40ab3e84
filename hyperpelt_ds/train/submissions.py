"""Answers as files: our own lines, and what the servers of GLUE and VQA take.

This file must not know where answers come from. The words and file names of GLUE's server are in tasks/glue.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hyperpelt_ds import dist, tasks
from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.tasks import glue, metrics

log = dist.logger(__name__)


class Format(NamedTuple):
    """`check` raises ValueError for samples that have no place in the format; `files` gives file name -> content for
    samples, their answers and the name of their split."""

    check: Callable[[Sequence[Sample]], None]
    files: Callable[[Sequence[Sample], Sequence[str], str], dict[str, str]]


def _anything(samples: Sequence[Sample]) -> None:
    return None


def _lines(samples: Sequence[Sample], texts: Sequence[str], split: str) -> dict[str, str]:
    """One object a line, in the order of the input."""
    answers = [
        {"key": sample.key, "task": sample.task, "prediction": text}
        for sample, text in zip(samples, texts, strict=True)
    ]
    return {"predictions.jsonl": "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)}


def _check_glue(samples: Sequence[Sample]) -> None:
    for sample in samples:
        if sample.task not in glue.LEADERBOARD:
            raise ValueError(f"--format glue: {sample.task!r} is none of GLUE's tasks: {', '.join(glue.LEADERBOARD)}")
    _numbers(samples)


def _glue(samples: Sequence[Sample], texts: Sequence[str], split: str) -> dict[str, str]:
    """One table a task, sorted by index. The server takes no line without a label: an answer that is none becomes the
    first label (for STS-B, 0), with a warning that counts them."""
    rows: dict[str, list[tuple[int, str]]] = {}
    unreadable = 0
    for sample, text, number in zip(samples, texts, _numbers(samples), strict=True):
        word, is_label = _glue_word(sample.task, text)
        rows.setdefault(sample.task, []).append((number, word))
        unreadable += not is_label
    if unreadable:
        log.warning("%d of %d answers are no label; they are written as the first one", unreadable, len(texts))
    return {
        f"{glue.leaderboard_file(task, split)}.tsv": "index\tprediction\n"
        + "".join(f"{number}\t{word}\n" for number, word in sorted(own))
        for task, own in rows.items()
    }


def _glue_word(task: str, text: str) -> tuple[str, bool]:
    """An answer as the server writes it, and whether it was a label at all."""
    words = glue.LEADERBOARD[task].words
    if not words:
        value = metrics.number(text)
        return f"{min(max(value, 0.0), glue.STSB_TOP):.3f}", value != metrics.UNREADABLE
    record = tasks.get(task)
    word = dict(zip(record.labels, words, strict=True)).get(record.parse(text))
    return word or words[0], word is not None


def _check_vqa(samples: Sequence[Sample]) -> None:
    for sample in samples:
        if "vqa_accuracy" not in tasks.get(sample.task).metrics:
            allowed = [task.name for task in tasks.TASKS.values() if "vqa_accuracy" in task.metrics]
            raise ValueError(f"--format vqa: {sample.task!r} is none of {', '.join(allowed)}")
    _numbers(samples)


def _vqa(samples: Sequence[Sample], texts: Sequence[str], split: str) -> dict[str, str]:
    """One list a task, in the order of the input."""
    lists: dict[str, list[dict[str, int | str]]] = {}
    for sample, text, number in zip(samples, texts, _numbers(samples), strict=True):
        lists.setdefault(sample.task, []).append({"question_id": number, "answer": text})
    return {f"{task}.json": json.dumps(own) + "\n" for task, own in lists.items()}


def _numbers(samples: Sequence[Sample]) -> list[int]:
    """The number that each key ends with, GLUE's index or VQA's question id; ValueError where there is none or where
    two samples of a task have the same."""
    seen: dict[tuple[str, int], str] = {}
    numbers = []
    for sample in samples:
        found = re.search(r"[0-9]+$", sample.key)
        if found is None:
            raise ValueError(
                f"key {sample.key!r} of task {sample.task!r} must end with the number that the server knows"
            )
        number = int(found.group())
        other = seen.setdefault((sample.task, number), sample.key)
        if other != sample.key:
            raise ValueError(f"keys {other!r} and {sample.key!r} of task {sample.task!r} end with the same number")
        numbers.append(number)
    return numbers


FORMATS = {"jsonl": Format(_anything, _lines), "glue": Format(_check_glue, _glue), "vqa": Format(_check_vqa, _vqa)}
