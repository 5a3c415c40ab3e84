"""The page of one or several runs: one HTML file that needs nothing else, neither network nor scripts.

What a run has no data for is left out, with a word. This file knows the order of the sections and how a page begins.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from hyperpelt_ds.report import figures, observed, scores, sections, state
from hyperpelt_ds.report.files import RunFiles, read
from hyperpelt_ds.report.html import Html, duration, join, moment, number, tag
from hyperpelt_ds.report.shown import Shown, together
from hyperpelt_ds.report.style import CSS
from hyperpelt_ds.train import outcome

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for the page: nothing but what is in it."""

_SECTIONS = (
    ("Scores", scores.section),
    ("Curves", figures.section),
    ("Tasks beside each other", observed.maps),
    ("Examples", observed.examples),
    ("Data", sections.data),
    ("Setup", sections.setup),
    ("Counts", sections.counts),
    ("Environment", sections.environment),
)


def write(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the page of the runs to `out` (report.html in the first one) and returns its path.

    Raises ValueError for a folder that is no run or is given twice, for a file in it that cannot be read, and for an
    `out` in no folder.
    """
    folders = [Path(folder).resolve() for folder in run_dirs]
    if len(set(folders)) < len(folders):
        raise ValueError(f"a run is given twice: {', '.join(map(str, run_dirs))}")
    file = Path(out) if out else Path(run_dirs[0]) / "report.html"
    if out and not file.resolve().parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {file.parent}")
    text = page([read(folder) for folder in run_dirs])
    file.write_text(text)
    return file


def page(runs: Sequence[RunFiles]) -> Html:
    """The whole document."""
    shown = together(runs)
    title = " · ".join(run.name for run in shown)
    parts, links, missing = [], [], []
    for name, section in _SECTIONS:
        content = section(shown)
        if content is None:
            missing.append(name.lower())
            continue
        place = name.lower().replace(" ", "-")
        links.append(tag("a", name, href=f"#{place}"))
        parts.append(tag("section", tag("h2", name), content, id=place))
    legend = tag("span", *(run.swatch for run in shown), class_="runs") if len(shown) > 1 else None
    left_out = f"Left out, since the files have nothing about it: {', '.join(missing)}. " if missing else ""
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} – report"),
        tag("style", Html(CSS)),
    ]
    body = [
        tag("header", tag("h1", title), tag("div", *map(_card, shown), class_="cards")),
        tag("nav", tag("div", *links, legend)),
        tag("main", *parts),
        tag("footer", f"{left_out}Made {moment(time.time())} by launch/report.py."),
    ]
    return join([Html("<!doctype html>\n"), tag("html", tag("head", *head), tag("body", *body), lang="en"), Html("\n")])


def _card(run: Shown) -> Html:
    """What is first asked of a run."""
    files, judged = run.files, state.judge(run.files)
    kind = {outcome.FINISHED: "good", outcome.RUNNING: "good"}.get(judged.word, "bad")
    word = tag(
        "p",
        tag("span", judged.word, class_=f"state {'' if judged.word == state.UNKNOWN else kind}"),
        f": {judged.said}",
    )
    steps = files.setting("train.steps")
    progress = files.checkpoint.state["progress"] if files.checkpoint else {}
    best = files.best or {}
    trainable = (files.results or {}).get("trainable") or sum(files.parameters.values())
    rows = {
        "step": f"{number(files.step)} of {number(steps)}" if steps else number(files.step),
        "best validation": f"{number(best['score'])} at step {number(best['step'])}" if best else None,
        "samples": number(progress["stream"]["samples"]) if progress else None,
        "time": duration(progress["seconds"]) if progress else None,
        "trainable": number(trainable) if trainable else None,
        "next": None if judged.word == outcome.FINISHED and files.results else tag("code", judged.next),
    }
    facts = [join([tag("dt", name), tag("dd", value)]) for name, value in rows.items() if value]
    return tag("article", tag("h3", run.swatch) if run.mark else None, word, tag("dl", *facts), class_="card")
