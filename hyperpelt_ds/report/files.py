"""The files of a run's folder, read into one record; what is not there is empty.

A run that still goes on is read as it stands: a half-written last line counts as not yet written. This file must not
know how anything is shown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperpelt_ds import lines
from hyperpelt_ds.train.outcome import DONE, STATUS, read_status

CONFIG, ENVIRONMENT, METRICS, RESULTS = "config.json", "environment.json", "metrics.jsonl", "results.json"
LOOKS = 20
"""So many of the newest looks at the model are read."""
_SIGNS = CONFIG, METRICS, STATUS, RESULTS
"""A folder with none of these is no run."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: its name, when it was written (seconds since 1970), and its state.json."""

    name: str
    time: float
    state: dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """A run as its files tell it; each field is empty (or None) if its file is not there.

    `lines` are those of metrics.jsonl, `observations` (the newest) and `samples` as docs/monitoring.md has them,
    `holes` those of all ranks, in order of steps. `parameters` are trainable ones by the part of the model that they
    belong to, from the header of the newest weights.
    """

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    status: dict[str, Any] | None
    done: bool
    lines: list[dict[str, Any]]
    results: dict[str, Any] | None
    best: dict[str, Any] | None
    checkpoint: Checkpoint | None
    parameters: dict[str, int]
    holes: list[dict[str, Any]]
    bad_steps: list[dict[str, Any]]
    rollback: dict[str, Any] | None
    stacks: dict[str, str]
    observations: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every line that has the figure."""
        return [(line["step"], line[name]) for line in self.lines if line.get(name) is not None]

    def last(self, name: str) -> float | None:
        """The newest value of a figure."""
        found = self.series(name)
        return found[-1][1] if found else None

    @property
    def step(self) -> int:
        """The last step that any file speaks of."""
        return max([self.status["step"] if self.status else 0, *(line["step"] for line in self.lines[-1:])])

    def setting(self, name: str) -> Any:
        """A value of the configuration, by section.key; None if there is none."""
        section, _, key = name.partition(".")
        values = self.config.get(section)
        return values.get(key) if key and isinstance(values, dict) else values


def read(run_dir: str | Path) -> RunFiles:
    """Raises ValueError for a folder that is no run, and for a file in it that cannot be read."""
    folder = Path(run_dir)
    if not any((folder / name).is_file() for name in _SIGNS):
        what = f"has none of {', '.join(_SIGNS)}" if folder.is_dir() else "does not exist"
        raise ValueError(f"{folder} is no run's folder: it {what}")
    holes = [hole for file in sorted(folder.glob("holes/rank_*.jsonl")) for hole in lines.read(file)]
    newest = _newest(folder)
    weights = [folder / "best"] if newest is None else [folder / newest.name, folder / "best"]
    return RunFiles(
        folder,
        read_json(folder / CONFIG) or {},
        read_json(folder / ENVIRONMENT) or {},
        read_status(folder),
        (folder / DONE).is_file(),
        lines.read(folder / METRICS),
        read_json(folder / RESULTS),
        read_json(folder / "best" / "score.json"),
        newest,
        next(filter(None, map(_parameters, weights)), {}),
        sorted(holes, key=lambda hole: hole["step"]),
        lines.read(folder / "bad_steps.jsonl"),
        read_json(folder / "rollback.json"),
        {file.name: file.read_text(errors="replace") for file in sorted(folder.glob("stack_*.txt"))},
        lines.newest(folder / "observations.jsonl", LOOKS),
        lines.read(folder / "samples.jsonl"),
    )


def read_json(file: Path) -> Any:
    """What a file holds; None if it is not there."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def _newest(folder: Path) -> Checkpoint | None:
    """The checkpoint that LATEST names, if it is there."""
    latest = folder / "LATEST"
    state = folder / latest.read_text().strip() / "state.json" if latest.is_file() else None
    if state is None or not state.is_file():
        return None
    return Checkpoint(state.parent.name, state.stat().st_mtime, read_json(state))


def _parameters(folder: Path) -> dict[str, int]:
    """Numbers in a weights file by the first two words of their names, from its header alone; none if there is no file.

    A safetensors file begins with the length of a JSON object, 8 bytes, little-endian, and that object.
    """
    file = folder / "weights.safetensors"
    if not file.is_file():
        return {}
    with file.open("rb") as content:
        header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
    counts: dict[str, int] = {}
    for name, tensor in header.items():
        if name != "__metadata__":
            size = 1
            for length in tensor["shape"]:
                size *= length
            part = ".".join(name.split(".")[:2])
            counts[part] = counts.get(part, 0) + size
    return counts
