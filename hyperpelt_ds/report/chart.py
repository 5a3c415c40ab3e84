"""Charts as SVG: curves over steps, scores with their intervals, and square maps of numbers.

Colours are names of the page's style (tone 0, 1, ...), so that light and dark need no second drawing. This file must
not know what a run is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from hyperpelt_ds.report.html import Html, folded, join, number, short, table, tag

Point = tuple[float, float]
TONES = 6
"""Colours there are; a seventh line takes the first one, dashed."""

_WIDTH, _HEIGHT = 400, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 68, 10, 36
_DRAWN = 160
"""At most about so many points of a line are drawn."""
_TICKS = 4
_SMOOTH_FROM = 40
"""Points from which a noisy line gets its running mean."""
_LOG_FROM = 8.0
"""How much larger than its last values a positive curve must have been for a logarithmic axis."""


@dataclass(frozen=True)
class Line:
    """A curve: `mark` is the short name at its end, `label` the whole one."""

    label: str
    mark: str
    tone: int
    points: Sequence[Point]


def curves(title: str, unit: str, lines: Sequence[Line], bounds: Point | None = None, noisy: bool = False) -> Html:
    """Lines over steps as a figure, with the same numbers in a folded table.

    The axis spans `bounds` if all values lie within them. Of a long line the extremes of every stretch are drawn.
    `noisy` lines that are long get their running mean on top; the number at the
    end is then its last value. Points that are not finite are left out and counted.
    """
    finite = [[p for p in line.points if math.isfinite(p[1])] for line in lines]
    lost = sum(len(line.points) for line in lines) - sum(map(len, finite))
    drawn = [thinned(points) for points in finite]
    note = f"{lost} values that are not finite are left out. " if lost else ""
    thin = any(len(a) < len(b) for a, b in zip(drawn, finite, strict=True))
    note += "Long curves are thinned, their highest and lowest points kept. " if thin else ""
    if not any(drawn):
        return tag("figure", tag("figcaption", title), tag("p", "No finite value.", class_="quiet"), class_="chart")
    across = _Axis(*_reach([p[0] for points in drawn for p in points]), _LEFT, _WIDTH - _RIGHT)
    values = [p[1] for points in drawn for p in points]
    low, high = _reach(values)
    log = noisy and low > 0 and high / max(points[-1][1] for points in drawn if points) > _LOG_FROM
    if bounds and bounds[0] <= min(values) and max(values) <= bounds[1]:
        low, high = bounds
    elif not log:
        low, high = _rounded(low, high)
    up = _Axis(low, high, _HEIGHT - _BOTTOM, _TOP, log)
    main = [thinned(smoothed(p)) if noisy and len(p) >= _SMOOTH_FROM else None for p in finite]
    last = [(points or raw or [(0, low)])[-1][1] for points, raw in zip(main, drawn, strict=True)]
    parts = [_grid(across, up, unit + (", log scale" if log else ""))]
    for line, points, mean, value, place in zip(lines, drawn, main, last, _spread([up(v) for v in last]), strict=True):
        if points:
            parts.append(_line(line, points, mean, across, up))
            text = f"{line.mark} {short(value)}".strip()
            parts.append(_text(_WIDTH - _RIGHT + 7, place + 4, text, f"end tone{line.tone % TONES}"))
    for line, points in zip(lines, drawn, strict=True):
        parts.append(_targets(line, points, across, up))
    ends = [f"{line.label} ends at {number(p[-1][1])}" for line, p in zip(lines, drawn, strict=True) if p]
    label = f"{title}: {'; '.join(ends)}"
    svg = tag("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label)
    return tag("figure", tag("figcaption", title), svg, folded("numbers", _numbers(lines, drawn, note)), class_="chart")


def interval(value: float, low: float, high: float, marks: Sequence[tuple[str, str, float]], tone: int) -> Html:
    """A score and its interval on a line from 0 to 1, with (class, name, value) marks for what it is compared with.

    All values must lie within 0 and 1.
    """
    width, height, pad = 170, 18, 5

    def x(at: float) -> float:
        return pad + at * (width - 2 * pad)

    middle = height / 2
    parts = [tag("line", x1=x(0), x2=x(1), y1=middle, y2=middle, class_="rail")]
    parts += [tag("line", x1=x(at), x2=x(at), y1=middle - 3, y2=middle + 3, class_="rail") for at in (0, 0.5, 1)]
    for kind, name, at in marks:
        shape = (
            tag("path", d=f"M{x(at):.1f} {middle - 4}l4 4l-4 4l-4 -4z", class_=kind)
            if kind == "words"
            else tag("line", x1=x(at), x2=x(at), y1=2, y2=height - 2, class_=kind)
        )
        parts.append(tag("g", tag("title", f"{name} {at:.3f}"), shape))
    dot = tag("circle", cx=x(value), cy=middle, r=3.5)
    whisker = tag("line", x1=x(low), x2=x(high), y1=middle, y2=middle, class_="whisker")
    said = f"{value:.3f}, 95 % interval {low:.3f} to {high:.3f}"
    parts.append(tag("g", tag("title", said), whisker, dot, class_=f"score tone{tone % TONES}"))
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img", aria_label=said)


def matrix(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], title: object, limit: float
) -> Html:
    """A map: the number in every cell, its colour from -limit over none at 0 to +limit; empty where it is not known."""
    head = tag("tr", tag("th"), *(tag("th", tag("span", name), scope="col") for name in columns))
    body = []
    for name, row in zip(rows, values, strict=True):
        cells = [_cell(name, column, value, limit) for column, value in zip(columns, row, strict=True)]
        body.append(tag("tr", tag("th", name, scope="row"), *cells))
    inner = tag("table", tag("thead", head), tag("tbody", *body), class_="matrix")
    return tag("figure", tag("figcaption", title), tag("div", inner, class_="scroll", tabindex=0), class_="map")


def thinned(points: Sequence[Point], limit: int = _DRAWN) -> list[Point]:
    """All points, or about `limit`: the lowest and the highest of every stretch, with the first and the last."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Each point's mean with its neighbours, a thirtieth of all on either side."""
    half = max(2, len(points) // 30)
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    ends = [(max(0, i - half), min(i + half + 1, len(points))) for i in range(len(points))]
    return [(step, (sums[b] - sums[a]) / (b - a)) for (step, _), (a, b) in zip(points, ends, strict=True)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], at most about `count` of them."""
    step = _pace(low, high, count)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` to places from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self, count: int) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high, count)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if self.high / self.low < 200 else (1,)
        return [m * 10.0**p for p in powers for m in steps if self.low <= m * 10.0**p <= self.high]


def _pace(low: float, high: float, count: int) -> float:
    """The round distance between ticks."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)


def _rounded(low: float, high: float) -> Point:
    """The span widened to ticks."""
    step = _pace(low, high, _TICKS)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _reach(values: Sequence[float]) -> Point:
    """The span of some values, never empty."""
    low, high = min(values), max(values)
    margin = 0.0 if high > low else abs(low) * 0.1 or 1.0
    return low - margin, high + margin


def _grid(across: _Axis, up: _Axis, unit: str) -> Html:
    parts = [_text(_LEFT, _HEIGHT - 4, unit, "axis start"), _text(_WIDTH - _RIGHT, _HEIGHT - 4, "step", "axis far")]
    for at in up.ticks(_TICKS):
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=up(at), y2=up(at), class_="rule"))
        parts.append(_text(_LEFT - 6, up(at) + 4, short(at), "axis far"))
    parts += [_text(across(at), _HEIGHT - _BOTTOM + 15, short(at), "axis") for at in across.ticks(5) if at == int(at)]
    return join(parts)


def _line(line: Line, points: Sequence[Point], smooth: Sequence[Point] | None, across: _Axis, up: _Axis) -> Html:
    kind = f"curve tone{line.tone % TONES}" + (" dashed" if line.tone >= TONES else "")
    if smooth is None:
        dot = tag("circle", cx=across(points[-1][0]), cy=up(points[-1][1]), r=2.5, class_=kind + " dot")
        return join([tag("path", d=_path(points, across, up), class_=kind), dot])
    raw = tag("path", d=_path(points, across, up), class_=kind + " raw")
    return join([raw, tag("path", d=_path(smooth, across, up), class_=kind)])


def _path(points: Sequence[Point], across: _Axis, up: _Axis) -> str:
    return "M" + "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in points)


def _targets(line: Line, points: Sequence[Point], across: _Axis, up: _Axis) -> Html:
    """What the pointer meets: each point names itself."""
    return join(
        tag("circle", tag("title", f"{line.label}, step {number(x)}: {number(y)}"), cx=across(x), cy=up(y), r=6,
            class_=f"target tone{line.tone % TONES}")
        for x, y in points
    )  # fmt: skip


def _spread(places: Sequence[float], least: float = 13.0) -> list[float]:
    """The places moved down as far as needed that no two labels overlap, and up again as a whole if that leaves the
    chart."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, after in itertools.pairwise(order):
        moved[after] = max(moved[after], moved[before] + least)
    over = max(0.0, moved[order[-1]] - (_HEIGHT - _BOTTOM + 4))
    return [place - over for place in moved]


def _numbers(lines: Sequence[Line], drawn: Sequence[Sequence[Point]], note: str) -> Html:
    values = [dict(points) for points in drawn]
    steps = sorted({step for column in values for step in column})
    rows = [[number(step), *(number(column[step]) if step in column else "" for column in values)] for step in steps]
    head = ["step", *(line.label for line in lines)]
    return join([tag("p", note, class_="quiet") if note else None, table(head, rows, words=0)])


def _cell(row: str, column: str, value: float | None, limit: float) -> Html:
    if value is None or not math.isfinite(value):
        return tag("td", "", title=f"{row}, {column}: not known")
    if 0 < abs(value) < 0.005:  # two places would call it nothing
        text = short(value)
    else:
        text = f"{value:.2f}".replace("-", "−") if abs(value) < 100 else number(round(value))
    share = min(1.0, abs(value) / limit) if limit else 0.0
    kind = "above" if value > 0 else "below"
    return tag("td", text, class_=kind, style=f"--share:{share:.2f}", title=f"{row}, {column}: {text}")


def _text(x: float, y: float, text: str, kind: str) -> Html:
    return tag("text", text, x=x, y=y, class_=kind)
