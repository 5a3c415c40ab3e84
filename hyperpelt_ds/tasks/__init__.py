"""Tasks as data: what is asked, how an answer is judged, and what answering without a model scores."""

from __future__ import annotations

import difflib

from hyperpelt_ds.tasks.demo import DEMO
from hyperpelt_ds.tasks.glue import GLUE
from hyperpelt_ds.tasks.task import Task
from hyperpelt_ds.tasks.transfer import TRANSFER
from hyperpelt_ds.tasks.vl import VL

__all__ = ["TASKS", "Task", "get", "needs_image"]

TASKS: dict[str, Task] = {task.name: task for task in (*DEMO, *GLUE, *TRANSFER, *VL)}


def get(name: str) -> Task:
    """The task of that name; raises ValueError with the nearest names."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 3, 0.4) or list(TASKS)
        raise ValueError(f"unknown task {name!r}; did you mean {', '.join(near)}?")
    return TASKS[name]


def needs_image(name: str) -> bool:
    """Whether every sample of the task comes with an image."""
    return get(name).modality == "vision"
