"""Tasks of a user's own tables: records that lie in a manifest and not in this package.

data_prep/table.py writes one for each such task; `tasks.adopt` makes them known to a process that loads the manifest or
a run that was trained on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hyperpelt_ds.tasks.task import NUMERIC, Example, Task, normalise

DEFAULT = ("exact_match",)
_CLASSES = ("accuracy", "f1", "mcc")
WORDS, EXACT = "words", "exact"


def _as_it_is(example: Example) -> tuple[str, str]:
    """source, target: the texts of the table."""
    return example["source"], example["target"]


def task(
    name: str,
    metrics: Sequence[str] = DEFAULT,
    labels: Sequence[str] = (),
    description: str = "",
    has_images: bool = False,
    compare: str = "",
) -> Task:
    """The record of a task whose sources and targets are a table's texts as they are.

    metrics: names of metrics.METRICS. labels: the closed set of targets, for metrics of classes; of two, the second is
    the positive one. compare: how answers are compared: WORDS leaves out case and all that is no letter or digit, EXACT
    only the spaces around; words if left out, but exact for numbers and if labels would else be the same or none.
    Raises ValueError for an unknown metric, one that needs labels where there are none, a label given twice, and labels
    that words do not tell apart.
    """
    from hyperpelt_ds.tasks.metrics import METRICS  # takes seconds to import, and most processes know no such task

    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"task {name!r}: unknown metric {metric!r}; there are {', '.join(METRICS)}")
        if metric in _CLASSES and not labels:
            raise ValueError(f"task {name!r}: metric {metric!r} compares classes and needs the task's labels")
        if metric == "f1" and len(labels) != 2:
            raise ValueError(f"task {name!r}: metric 'f1' is of two labels, the second positive; got {len(labels)}")
    if not metrics or len(set(labels)) < len(labels) or not all(label.strip() for label in labels):
        raise ValueError(f"task {name!r}: expected at least one metric, and labels that differ, got {list(labels)}")
    words = {normalise(label) for label in labels} - {""}
    if compare not in ("", WORDS, EXACT):
        raise ValueError(f"task {name!r}: answers are compared as {WORDS} or {EXACT}, not {compare!r}")
    if compare == WORDS and len(words) < len(labels):
        raise ValueError(f"task {name!r}: some of its labels are the same, or nothing, as words; compare them {EXACT}")
    plain = compare == EXACT or (not compare and (len(words) < len(labels) or any(m in NUMERIC for m in metrics)))
    return Task(
        name,
        "vision" if has_images else "text",
        tuple(metrics),
        "a table of the user's own",
        description or f"{name.replace('_', ' ').replace('-', ' ').capitalize()}.",
        _as_it_is,
        str.strip if plain else normalise,
        tuple(labels),
    )


def fields(record: Task) -> dict[str, Any]:
    """What a manifest stores of such a record."""
    return {
        "metrics": list(record.metrics),
        "labels": list(record.labels),
        "description": record.description,
        "has_images": record.modality == "vision",
        "compare": WORDS if record.parse is normalise else EXACT,
    }


def from_fields(name: str, stored: Mapping[str, Any]) -> Task:
    """The record that `fields` was called with; raises ValueError naming the task for anything else."""
    try:
        return task(name, **stored)
    except TypeError as error:
        raise ValueError(f"task {name!r}: the data set's record of it cannot be read: {error}") from None
