"""The section of curves: every figure of metrics.jsonl over steps, all runs in one chart.

It knows the names that train/metrics.py lists only to put them in groups; a figure that it does not know gets a chart
too.
"""

from __future__ import annotations

from collections.abc import Sequence

from hyperpelt_ds.report.chart import Line, curves
from hyperpelt_ds.report.html import Html, folded, join, number, tag
from hyperpelt_ds.report.shown import Shown

_UNITS = {
    "samples_per_second": "samples/s",
    "tokens_per_second": "tokens/s",
    "memory_gib": "GiB",
    "padding_share": "share",
    "wait_fraction": "share",
    "truncated": "sources",
    "holes": "samples",
    "skipped_steps": "steps",
    "gradient_norm": "norm",
    "learning_rate": "rate",
    "loss": "loss",
}
_NOISY = ("loss", "norm", "_second", "share", "fraction")
_GROUPS = ("Loss", "Validation", "Optimizer", "Speed and data")
_OPEN = 12
"""Charts of a group that are there at once; more are behind a click."""


def section(runs: Sequence[Shown]) -> Html | None:
    """None if no run has a figure."""
    names = list(dict.fromkeys(name for run in runs for line in run.files.lines for name in line))
    names = [name for name in names if name not in ("step", "time") and _is_number(runs, name)]
    if not names:
        return None
    still = {name: value for name in names if (value := _constant(runs, name)) is not None}
    groups: dict[str, list[str]] = {group: [] for group in _GROUPS}
    for name in names:
        if name not in still:
            groups.setdefault(_group(name), []).append(name)
    note = "A long noisy curve is thin, with its running mean over it. Point at a curve to read a value."
    parts = [tag("p", note, class_="quiet")]
    for group, own in groups.items():
        charts = [_chart(runs, name) for name in sorted(own, key=lambda name: (name.count("/") > 1, own.index(name)))]
        if charts:
            parts.append(tag("h3", group))
            parts.append(tag("div", *charts[:_OPEN], class_="charts"))
            if charts[_OPEN:]:
                parts.append(folded(f"{len(charts) - _OPEN} more", tag("div", *charts[_OPEN:], class_="charts")))
    if still:
        same = ", ".join(f"{name} {number(value)}" for name, value in still.items())
        parts.append(tag("p", f"The same throughout: {same}.", class_="quiet"))
    return join(parts)


def _chart(runs: Sequence[Shown], name: str) -> Html:
    lines = [Line(run.label, run.mark, run.tone, points) for run in runs if (points := run.files.series(name))]
    last = name.rpartition("/")[2]
    bounds = (0.0, 1.0) if _group(name) == "Validation" else None
    noisy = last.endswith(_NOISY) or name.startswith("gradient_")
    return curves(name, _UNITS.get(last, "score" if bounds else ""), lines, bounds, noisy)


def _group(name: str) -> str:
    first, _, rest = name.partition("/")
    if first == "train":
        return "Loss" if rest.endswith("loss") else "Optimizer"
    return {"eval": "Validation", "perf": "Speed and data", "data": "Speed and data"}.get(
        first, first.replace("_", " ").capitalize()
    )


def _constant(runs: Sequence[Shown], name: str) -> float | None:
    """The one value that a figure kept in all runs, if it did; validations are drawn all the same."""
    values = [value for run in runs for _, value in run.files.series(name)]
    return values[0] if len(values) > 1 and len(set(values)) == 1 and not name.startswith("eval/") else None


def _is_number(runs: Sequence[Shown], name: str) -> bool:
    return all(isinstance(value, (int, float)) for run in runs for _, value in run.files.series(name))
