"""The section of scores: what launch/evaluate.py wrote, beside what needs no model and what the controls give.

This file must not know how anything is scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hyperpelt_ds.report.chart import TONES, interval
from hyperpelt_ds.report.html import Html, duration, join, number, score, table, tag
from hyperpelt_ds.report.shown import Shown

_CONTROL = "shuffled_"
_TROUBLES = {"truncated": "sources cut", "unreadable": "images unreadable", "left_out": "texts left out"}

Row = tuple[str, str, Mapping[str, Any]]
"""A label, a metric, and the figures of that line."""


def section(runs: Sequence[Shown]) -> Html | None:
    """Results where there are some, else the scores of the best validation; None if there are neither."""
    scored = [run for run in runs if run.files.results]
    parts = [_results(scored) if scored else None]
    others = [run for run in runs if not run.files.results]
    validated = [run for run in others if run.files.best]
    if validated:
        parts.append(tag("h3", "Best validation"))
        parts.append(_validation(validated))
    for run in others:
        command = tag("code", f"python launch/evaluate.py --run_dir {run.files.folder}")
        parts.append(tag("p", run.swatch, " has no results.json yet: ", command, class_="quiet"))
    return join(parts) if scored or validated else None


def _results(runs: Sequence[Shown]) -> Html:
    tables = [run.files.results or {} for run in runs]
    tasks = list(dict.fromkeys(task for results in tables for task in results["tasks"]))
    every = [row for results in tables for row in results["tasks"].values()]
    controls = list(dict.fromkeys(key for row in every for key in row if key.startswith(_CONTROL)))
    controls = [name for name in controls if name != f"{_CONTROL}n"]
    several = len(runs) > 1
    drawn = all(row["low"] >= 0 and row["high"] <= 1 for row in every)
    body: list[Sequence[object]] = []
    for task in tasks:
        rows = [(run, results["tasks"].get(task)) for run, results in zip(runs, tables, strict=True)]
        own = [(run, list(_lines(task, row))) for run, row in rows if row]
        for place in range(max(len(lines) for _, lines in own)):
            there = [(run, lines[place]) for run, lines in own if place < len(lines)]
            body += [_cells(run, row, controls, several, drawn, first=not i) for i, (run, row) in enumerate(there)]
    head = ["task", *(["run"] if several else []), "metric", *(["0 to 1"] if drawn else []), "score", "95 % interval"]
    head += ["prior", "bag of words", *(name.removeprefix(_CONTROL) + " shuffled" for name in controls), "n"]
    words = 2 + several + drawn
    notes = [tag("p", _note(run), class_="quiet") for run in runs]
    return join([_key() if drawn else None, table(head, body, words, class_="scores"), *notes])


def _lines(task: str, row: Mapping[str, Any]) -> Iterator[Row]:
    """A task's own line, then those of its metrics if it has several, then those of its groups."""
    several = len(row["metrics"]) > 1
    yield task, "mean" if several else next(iter(row["metrics"])), row
    if several:
        for metric, figure in row["metrics"].items():
            yield "", metric, figure
    for group, part in row["groups"].items():
        yield f"{task}: {group}", "", part


def _cells(run: Shown, row: Row, controls: Sequence[str], several: bool, drawn: bool, first: bool) -> list[object]:
    label, metric, figures = row
    prior, words = figures.get("baseline"), figures.get("bag_of_words")
    marks = [("prior", "prior", prior), ("words", "bag of words", words)]
    known = [(kind, name, value) for kind, name, value in marks if value is not None]
    plot = interval(figures["score"], figures["low"], figures["high"], known, run.tone) if drawn else None
    return [
        label if first else "",
        *([tag("span", run.mark, class_=f"mark tone{run.tone % TONES}")] if several else []),
        metric if first else "",
        *([plot] if drawn else []),
        tag("strong", score(figures["score"])),
        f"{score(figures['low'])} to {score(figures['high'])}",
        score(prior),
        score(words),
        *(score(figures.get(name)) for name in controls),
        number(figures["n"]) if "n" in figures else "",
    ]


def _key() -> Html:
    """What the marks of the drawn scores mean."""

    def sign(*shapes: Html) -> Html:
        return tag("svg", *shapes, width=18, height=16, viewBox="0 0 18 16", aria_hidden="true")

    dot = tag("circle", cx=9, cy=8, r=3.5, fill="currentColor")
    signs = {
        "score and 95 % interval": sign(tag("line", x1=1, x2=17, y1=8, y2=8, class_="whisker"), dot),
        "prior: the majority answer, or that to the same question": sign(
            tag("line", x1=9, x2=9, y1=1, y2=15, class_="prior")
        ),
        "bag of words": sign(tag("path", d="M9 4l4 4l-4 4l-4 -4z", class_="words")),
    }
    return tag("p", *(tag("span", drawn, said) for said, drawn in signs.items()), class_="quiet key")


def _note(run: Shown) -> Html:
    results = run.files.results or {}
    said = f"{results['split']} split"
    if results.get("glue_mean") is not None:
        said += f", GLUE mean of 11 numbers {results['glue_mean']:.4f}"
    for key, what in _TROUBLES.items():
        rows = {task: row for task, row in results["tasks"].items() if row.get(key)}
        counts = ", ".join(f"{number(row[key])} of {number(row['n'])} in {task}" for task, row in rows.items())
        said += f"; {what}: {counts}" if counts else ""
    said += f"; scored in {duration(results['scoring_seconds'])}."
    return join([run.swatch, ": ", said] if run.mark else [said[0].upper() + said[1:]])


def _validation(runs: Sequence[Shown]) -> Html:
    """Scores of the best validation of each run, which have no intervals."""
    tables = [run.files.best or {} for run in runs]
    names = list(dict.fromkeys((task, m) for best in tables for task, own in best["tasks"].items() for m in own))
    rows = [[task, m, *(score(best["tasks"].get(task, {}).get(m)) for best in tables)] for task, m in names]
    rows.append(["mean", "", *(score(best["score"]) for best in tables)])
    rows.append(["of step", "", *(number(best["step"]) for best in tables)])
    return table(["task", "metric", *(run.swatch if run.mark else "score" for run in runs)], rows, words=2)
