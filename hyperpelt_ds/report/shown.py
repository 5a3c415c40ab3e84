"""Runs side by side: the letter and the colour of each, and facts about all of them as rows of a table.

This file must not know what a page looks like.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hyperpelt_ds.report.chart import TONES
from hyperpelt_ds.report.files import RunFiles
from hyperpelt_ds.report.html import Html, table, tag


@dataclass(frozen=True)
class Shown:
    """A run on a page: `name` tells it from the others there; `mark` is a letter, empty if it is alone."""

    files: RunFiles
    name: str
    mark: str
    tone: int

    @property
    def label(self) -> str:
        return f"{self.mark} {self.name}".strip()

    @property
    def swatch(self) -> Html:
        """Its name, in its colour if there are others."""
        if not self.mark:
            return tag("span", self.name)
        return tag("span", self.label, class_=f"mark tone{self.tone % TONES}")


def together(runs: Sequence[RunFiles]) -> list[Shown]:
    """The runs with names that differ: those of their folders, or as much of their paths as it takes."""
    paths = [run.folder.resolve() for run in runs]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        common = os.path.commonpath([path.parent for path in paths])
        names = [os.path.relpath(path, common) for path in paths]
    marks = [""] if len(runs) == 1 else [_letters(i) for i in range(len(runs))]
    return [Shown(run, name, mark, i) for i, (run, name, mark) in enumerate(zip(runs, names, marks, strict=True))]


def facts(runs: Sequence[Shown], rows: Sequence[tuple[str, Callable[[RunFiles], object]]]) -> Html:
    """A table with a row for each fact that some run has, and a column for each run."""
    found = [(name, [of(run.files) for run in runs]) for name, of in rows]
    body = [
        [tag("code", name) if "." in name else name, *values] for name, values in found if any(map(_is_said, values))
    ]
    return table(["", *(run.swatch for run in runs)], body, words=1 + len(runs))


def _is_said(value: object) -> bool:
    return value is not None and value != ""


def _letters(place: int) -> str:
    """A, B, ..., Z, AA, ..."""
    return (_letters(place // 26 - 1) if place >= 26 else "") + chr(ord("A") + place % 26)
