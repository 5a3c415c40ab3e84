"""Draws what the demo scored: docs/demo.svg and the table in README.md, from docs/results/demo.json.

That file is a copy of the `results.json` that `make demo` leaves in `runs/demo`; no figure is written here by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
RECORD, FIGURE, README = DOCS / "results" / "demo.json", DOCS / "demo.svg", DOCS.parent / "README.md"
START, END = "<!-- from docs/results/demo.json by `make docs` -->\n", "<!-- end -->"
TITLES = {
    "movie_sentiment": "movie sentiment",
    "movie_rating": "movie rating, nine grades",
    "wikipedia_topic": "Wikipedia topic, eleven classes",
    "wikipedia_description": "Wikipedia description",
    "easy_vqa": "easy-VQA",
    "shape_caption": "shape caption",
}
METRICS = {"exact_match": "exact match", "token_f1": "token F1"}
RIVALS = ("score", "baseline", "bag_of_words")
"""Of these the highest of a row is bold."""
SHUFFLED = ("shuffled_task", "shuffled_image")

Row = Mapping[str, Any]

LEFT, RIGHT, TOP, STEP, WIDTH = 220, 690, 58, 34, 720
STYLE = """<style>
  svg { --paper: #ffffff; --ink: #1f2328; --line: #d1d9e0; --ours: #0969da; --words: #bc4c00; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #0d1117; --ink: #e6edf3; --line: #3d444d; --ours: #4493f8; --words: #f0883e; }
  }
  text { fill: var(--ink); font: 13px sans-serif; }
</style>"""
MARKS: dict[str, tuple[str, Callable[[float, float], str]]] = {
    "score": ("HyperPELT, 95 %", lambda x, y: f'<circle cx="{x:.1f}" cy="{y}" r="6" fill="var(--ours)"/>'),
    "bag_of_words": (
        "bag of words",
        lambda x, y: f'<path d="M{x:.1f} {y - 7}l7 7l-7 7l-7 -7z" fill="var(--words)"/>',
    ),
    "baseline": (
        "prior",
        lambda x, y: f'<circle cx="{x:.1f}" cy="{y}" r="5" fill="var(--paper)" stroke="var(--ink)" stroke-width="2"/>',
    ),
    "shuffled_task": ("another task's weights", lambda x, y: _cross(x, y, "M-5 -5l10 10M-5 5l10 -10")),
    "shuffled_image": ("another image's weights", lambda x, y: _cross(x, y, "M0 -8v16M-8 0h16")),
}


def figure(rows: Mapping[str, Row]) -> str:
    """Scores beside what needs no model, and under weights of another task or image, as an SVG."""
    bottom = TOP + STEP * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 34}" role="img">',
        "<title>Scores of the demo's six tasks, beside the prior and a bag of words</title>",
        STYLE,
        '<rect width="100%" height="100%" rx="6" fill="var(--paper)"/>',
        *_legend(),
    ]
    for tenth in range(0, 11, 2):
        x = _place(tenth / 10)
        parts.append(f'<path d="M{x:.1f} {TOP - 14}V{bottom - 8}" stroke="var(--line)"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 12}" text-anchor="middle">{tenth / 10:.1f}</text>')
    for number, (name, row) in enumerate(rows.items()):
        y = TOP + STEP * number + 4
        parts.append(f'<text x="{LEFT - 16}" y="{y + 4}" text-anchor="end">{TITLES[name]}</text>')
        low, high = _place(row["low"]), _place(row["high"])
        parts.append(f'<path d="M{low:.1f} {y}H{high:.1f}" stroke="var(--ours)" stroke-width="3"/>')
        parts += [draw(_place(row[key]), y) for key, (_, draw) in reversed(MARKS.items()) if row.get(key) is not None]
    return "\n".join([*parts, "</svg>\n"])


def table(rows: Mapping[str, Row]) -> str:
    """The same as a table in Markdown, with the groups of a task below it; the best of a row is bold."""
    head = "| task | metric | score [95 %] | prior | bag of words | task shuffled | image shuffled | n |"
    lines = [head, "|---|" + "---|" * 7]
    for name, row in rows.items():
        best = max(row[key] for key in RIVALS if row[key] is not None)
        marked = {key: f"**{row[key]:.3f}**" if row[key] == best else _number(row[key]) for key in RIVALS}
        cells = [TITLES[name], METRICS[next(iter(row["metrics"]))]]
        cells += [
            f"{marked['score']} [{row['low']:.3f}, {row['high']:.3f}]",
            marked["baseline"],
            marked["bag_of_words"],
        ]
        lines.append(_line([*cells, *(_number(row.get(key)) for key in SHUFFLED), f"{row['n']:,}"]))
        groups: Mapping[str, Row] = row["groups"]
        if groups:
            scores, priors = (" / ".join(_number(g[key]) for g in groups.values()) for key in ("score", "baseline"))
            kinds, counts = " / ".join(groups).replace("_", "-"), " / ".join(f"{g['n']:,}" for g in groups.values())
            lines.append(_line([f"&nbsp;&nbsp;{kinds} questions", "", scores, priors, "", "", "", counts]))
    return "\n".join(lines) + "\n"


def readme(text: str, rows: Mapping[str, Row]) -> str:
    """The README with this table in its place."""
    before, after = text.index(START) + len(START), text.index(END)
    return text[:before] + "\n" + table(rows) + "\n" + text[after:]


def record() -> Mapping[str, Row]:
    tasks: Mapping[str, Row] = json.loads(RECORD.read_text())["tasks"]
    return tasks


def _legend() -> list[str]:
    parts, x = [], 24.0
    for words, draw in MARKS.values():
        parts += [draw(x, 22), f'<text x="{x + 12:.1f}" y="26">{words}</text>']
        x += 44 + 6.1 * len(words)
    return parts


def _place(score: float) -> float:
    return LEFT + (RIGHT - LEFT) * score


def _cross(x: float, y: float, path: str) -> str:
    shifted = re.sub(r"M(-?\d+) (-?\d+)", lambda m: f"M{x + int(m[1]):.1f} {y + int(m[2])}", path)
    return f'<path d="{shifted}" stroke="var(--ink)" stroke-width="2"/>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    FIGURE.write_text(figure(record()))
    README.write_text(readme(README.read_text(), record()))
