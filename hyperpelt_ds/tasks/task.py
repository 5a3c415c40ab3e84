"""What a task is: one frozen record.

A task says how an example becomes a source and a target text, and how an answer is read and judged. It never loads
data, never tokenizes, and does not know its row in an embedding table.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Example = Mapping[str, Any]
"""One example as a data_prep builder reads it from its source; each task's `render` says which fields it uses."""


def normalise(text: str) -> str:
    """Lower case, words and numbers only, single spaces: "A red  circle." becomes "a red circle"."""
    return " ".join(re.findall(r"\w+", text.casefold()))


NUMERIC = ("pearson", "spearman")
"""The metrics that compare numbers."""


@dataclass(frozen=True)
class Task:
    """`about` says in one line what is asked, where the data comes from and under whose terms.

    metrics: names of tasks/metrics.py; the task's score is their mean.
    description: one sentence that says what to do, for models that are conditioned on a text. It is never part of the
    source.
    render: an example to its (source, target) texts, or None if the example carries no label for this task. The
    source never names the task: only its condition tells two tasks on the same source apart.
    parse: a generated or stored target to the label that scores compare.
    labels: the closed set of targets, in the order of the data set's own numbers; empty if answers are open. Of two
    labels the second is the positive one. A stored target outside the set is an error.
    paraphrases: other ways to say the description, as a control.
    """

    name: str
    modality: Literal["text", "vision"]
    metrics: tuple[str, ...]
    about: str
    description: str
    render: Callable[[Example], tuple[str, str] | None]
    parse: Callable[[str], str] = normalise
    labels: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()


def prompt(example: Example, fields: Sequence[str]) -> str:
    """The named fields, each after its own name: "premise: A man sleeps. hypothesis: A man is awake."."""
    return " ".join(f"{field}: {example[field]}" for field in fields)


def digit(label: int, classes: int) -> str | None:
    """The target of class number `label`, "0" for 0; None for -1, which marks an example without a label.

    Raises ValueError for any other number that is no class.
    """
    if label not in range(-1, classes):
        raise ValueError(f"label {label!r} is not one of 0 to {classes - 1}, or -1 for none")
    return None if label == -1 else str(label)


def classify(*fields: str, classes: int, label: str = "label") -> Callable[[Example], tuple[str, str] | None]:
    """A `render` for numbered classes: the fields as `prompt` writes them, and the number in field `label`."""

    def render(example: Example) -> tuple[str, str] | None:
        target = digit(example[label], classes)
        return None if target is None else (prompt(example, fields), target)

    return render


def check_text(what: str, text: str) -> None:
    """Raises ValueError for half a character (a lone surrogate, as cut JSON has them), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half a character, {text[error.start]!r}, in {text[:60]!r}") from None


def check_target(task: Task, key: str, target: str) -> None:
    """Raises ValueError naming task, sample, target and what is allowed for a target outside the task's labels."""
    if task.labels and target not in task.labels and task.parse(target) not in _parsed(task):
        allowed = ", ".join(task.labels)
        raise ValueError(f"task {task.name!r}, sample {key!r}: its target {target!r} is not one of {allowed}")


@functools.lru_cache
def _parsed(task: Task) -> frozenset[str]:
    return frozenset(map(task.parse, task.labels))
