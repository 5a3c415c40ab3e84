"""Tasks as data: what is asked, how an answer is judged, and what answering without a model scores."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from hyperpelt_ds.tasks import table
from hyperpelt_ds.tasks.demo import DEMO
from hyperpelt_ds.tasks.glue import GLUE
from hyperpelt_ds.tasks.task import Task
from hyperpelt_ds.tasks.transfer import TRANSFER
from hyperpelt_ds.tasks.vl import VL

__all__ = ["TASKS", "Task", "adopt", "adopt_all", "get", "needs_image", "own_records"]

TASKS: dict[str, Task] = {task.name: task for task in (*DEMO, *GLUE, *TRANSFER, *VL)}
_PACKAGE = frozenset(TASKS)


def get(name: str) -> Task:
    """The task of that name; raises ValueError with the nearest names."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 3, 0.4) or list(TASKS)
        raise ValueError(f"unknown task {name!r}; did you mean {', '.join(near)}?")
    return TASKS[name]


def needs_image(name: str) -> bool:
    """Whether every sample of the task comes with an image."""
    return get(name).modality == "vision"


def adopt(records: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes the records of a user's own tasks known, as a manifest (`about["records"]`) or a run stores them.

    A later one replaces an earlier one of its name. Raises ValueError for the name of a task of this package.
    """
    for name, stored in records.items():
        if name in _PACKAGE:
            raise ValueError(f"task {name!r} is one of this package, with sources and targets of its own; rename yours")
        TASKS[name] = table.from_fields(name, stored)


def adopt_all(names: Iterable[str], about: Mapping[str, Any]) -> None:
    """Makes every task of a data set known, by the records in its manifest's `about`.

    One without a record, of shards that were made elsewhere, keeps what is known of it, from the run that is asked for
    example, and is else scored by exact match.
    """
    stored = about.get("records", {})
    adopt({name: stored.get(name, {}) for name in names if name in stored or name not in TASKS})


def own_records(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What is to be stored of those of the tasks that are the user's own, for `adopt`."""
    return {name: table.fields(get(name)) for name in names if name not in _PACKAGE}
