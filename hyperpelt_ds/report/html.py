"""HTML and SVG as text: elements whose text is escaped unless it is itself made here.

Numbers and times are put in words for people here too. This file must not know what a run is.
"""

from __future__ import annotations

import html
import math
import time
from collections.abc import Iterable, Sequence
from datetime import datetime

_EMPTY = {"meta", "img"}
"""Elements that have no end."""


class Html(str):
    """Text that is already HTML."""


def tag(name: str, /, *content: object, **attributes: object) -> Html:
    """An element. None as content or attribute is left out; `class_` stands for class, `stroke_width` for stroke-width.

    All content that is not Html is escaped.
    """
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{said}>" if name in _EMPTY else f"<{name}{said}>{join(content)}</{name}>")


def join(content: Iterable[object], between: str = "") -> Html:
    """Pieces in a row, escaped where they are not Html."""
    return Html(between.join(x if isinstance(x, Html) else html.escape(str(x)) for x in content if x is not None))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], words: int = 1, **attributes: object) -> Html:
    """A table that scrolls by itself if it is too wide. The first `words` columns are text, the others numbers."""

    def cells(name: str, row: Sequence[object]) -> Html:
        return tag("tr", *(tag(name, cell, class_=None if i < words else "n") for i, cell in enumerate(row)))

    body = tag("tbody", *(cells("td", row) for row in rows))
    inner = tag("table", tag("thead", cells("th", head)), body, **attributes)
    return tag("div", inner, class_="scroll", tabindex=0)


def folded(summary: object, *content: object) -> Html:
    """Something to be opened with a click."""
    return tag("details", tag("summary", summary), *content)


def number(value: object, digits: int = 4) -> str:
    """A number with the digits that matter, or all of a whole one."""
    if value is None:
        return "–"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return str(value)
    if not math.isfinite(value):
        return str(float(value))
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    size = abs(value)
    if not 1e-3 <= size < 1e6:
        return _powered(value, digits)
    places = max(0, digits - 1 - math.floor(math.log10(size)))
    return _bare(f"{value:,.{min(places, 5)}f}")


def short(value: float) -> str:
    """A number where there is little room: three digits, thousands as k, M or G."""
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if least <= abs(value) < 1e12:
            return number(value / unit, 3) + letter
    return _powered(value, 3) if 0 < abs(value) < 1e-2 else number(value, 3)


def score(value: float | None) -> str:
    """A score with three places, as the tables of evaluations have it."""
    return "" if value is None else f"{value:.3f}"


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    whole = round(seconds)
    for size, unit, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"


def moment(seconds: float) -> str:
    """A time of day in this machine's zone."""
    zone = time.strftime("%Z", time.localtime(seconds))
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M} {zone}"


def _powered(value: float, digits: int) -> str:
    mantissa, _, power = f"{value:.{max(0, digits - 2)}e}".partition("e")
    return f"{_bare(mantissa)}e{int(power)}".replace("-", "−")


def _bare(text: str) -> str:
    """Decimals without zeros at their end, and a minus as long as a plus."""
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def _plain(value: object) -> str:
    """Coordinates need no more than a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
