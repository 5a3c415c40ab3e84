"""What belongs to one task alone, as a file of kilobytes that can be added to the run it was trained on.

A file holds the task's entry of every parameter that has one for each task (its embedding, or its own set of plain
parameters), and a fingerprint of all the others, without which it means nothing. This file must not know the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "hyperpelt_ds task 1"


class TaskEntries(NamedTuple):
    """task: its name. base: fingerprint of the weights that it was trained beside. entries: by parameter, with a length
    of 1 along the dimension of tasks."""

    task: str
    base: str
    entries: dict[str, Tensor]


def base_fingerprint(weights: Mapping[str, Tensor], per_task: Mapping[str, int], beside: str) -> str:
    """sha256 over names, shapes and bytes of all trained weights but those that have an entry for each task, and over
    `beside`: in words, what else the entries mean something in (the frozen backbone, the kinds of modules)."""
    digest = hashlib.sha256(beside.encode())
    for name, tensor in sorted(weights.items()):
        if name not in per_task:
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def entries_of(weights: Mapping[str, Tensor], per_task: Mapping[str, int], row: int) -> dict[str, Tensor]:
    """The entries of task number `row`."""
    return {name: weights[name].narrow(dim, row, 1).contiguous() for name, dim in per_task.items()}


def write(
    path: Path, task: str, weights: Mapping[str, Tensor], per_task: Mapping[str, int], row: int, beside: str
) -> None:
    """Writes the file of task number `row` of a run with the trained `weights`; `beside` as in `base_fingerprint`."""
    about = {"format": FORMAT, "task": task, "base": base_fingerprint(weights, per_task, beside)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(entries_of(weights, per_task, row), path, about)


def read(path: str | Path) -> TaskEntries:
    """Raises ValueError for a file that cannot be read or is no task file."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            entries = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"task file {path} cannot be read: {error}") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} is no task file: its format is {about.get('format')!r}, expected {FORMAT!r}")
    return TaskEntries(about["task"], about["base"], entries)
