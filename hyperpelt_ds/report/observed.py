"""What a run observed: maps of how alike its tasks are and where they pull apart, and answers with their pictures.

It reads what docs/monitoring.md describes, and must not know how it was measured.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from hyperpelt_ds.report.chart import TONES, matrix
from hyperpelt_ds.report.files import LOOKS
from hyperpelt_ds.report.html import Html, join, number, tag
from hyperpelt_ds.report.shown import Shown

_EACH = 4
"""Answers that are shown of each task."""
_THUMBNAIL = 256
"""Pixels of the longer side of a picture."""

Numbers = list[list[float | None]]


class Map(NamedTuple):
    """Numbers to be drawn; `bounded` ones lie within -1 and 1, others are 0 or more."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Numbers
    bounded: bool = True


def maps(runs: Sequence[Shown]) -> Html | None:
    """Cosines of embeddings, weights and gradients, norms and shares, each of all runs; None if no run looked."""
    looked = [run for run in runs if run.files.observations]
    if not looked:
        return None
    found = [_maps(run.files.observations) for run in looked]
    steps = ", ".join(
        f"{run.label + ' ' if run.mark else ''}step {number(run.files.observations[-1]['step'])}" for run in looked
    )
    said = (
        f"The newest look: {steps}. Cosines: 1 is the same direction, 0 nothing in common, below 0 opposed. Gradients "
        f"below 0 are tasks in conflict: what helps one harms the other. They and shares of attention are means over "
        f"the last {LOOKS} looks. "
        "A cell is empty where no look could tell."
    )
    parts: list[Html] = []
    for title in dict.fromkeys(title for own in found for title in own):
        own = [(run, own[title]) for run, own in zip(looked, found, strict=True) if title in own]
        limit = 1.0 if own[0][1].bounded else max(_largest(each.values) for _, each in own)
        drawn = [matrix(m.rows, m.columns, m.values, run.swatch if run.mark else title, limit) for run, m in own]
        parts += [join([tag("h3", title), tag("div", *drawn, class_="maps")])] if looked[0].mark else drawn
    body = join(parts) if looked[0].mark else tag("div", *parts, class_="maps")
    return join([tag("p", said, class_="quiet"), body])


def examples(runs: Sequence[Shown]) -> Html | None:
    """Answers at the newest validation, the same question to all runs in one place; None if no run shows any."""
    newest = {run.label: _newest(run.files.samples) for run in runs}
    asked: dict[str, dict[str, Mapping[str, Any]]] = {}
    for own in newest.values():
        for task, key in own:
            asked.setdefault(task, {}).setdefault(key, own[task, key])
    if not asked:
        return None
    parts: list[Html] = []
    for task, questions in asked.items():
        cards = []
        for key in list(questions)[:_EACH]:
            answers = [(run, found) for run in runs if (found := newest[run.label].get((task, key)))]
            cards.append(_card(answers))
        parts += [tag("h3", task), tag("div", *cards, class_="examples")]
    note = "Answers at the newest validation. ✓: exactly a reference; other answers may be right as well."
    return join([tag("p", note, class_="quiet"), *parts])


def _maps(looks: Sequence[Mapping[str, Any]]) -> dict[str, Map]:
    """Title -> map, of the newest look; gradients and shares of attention, which are of one step's samples, as means
    over those of the looks that had the same tasks."""
    last = looks[-1]
    tasks, weights = last["tasks"], last.get("weights", {})
    near = [look for look in looks if look["tasks"] == tasks]
    gradients = [look["gradients"] for look in near if "gradients" in look]
    kinds = list(dict.fromkeys(kind for found in gradients for kind in found))
    drawn = {
        f"hyper-embeddings ({condition}), cosine": Map(tasks, tasks, found["cosines"])
        for condition, found in last.get("hyper_embeddings", {}).items()
    }
    drawn |= {
        f"{kind} weights, cosine": Map(tasks, tasks, found["cosines"])
        for kind, found in weights.items()
        if "cosines" in found
    }
    for kind in kinds:
        cosines = [found[kind]["cosines"] for found in gradients if "cosines" in found.get(kind, {})]
        if cosines:
            drawn[f"{kind} gradients, cosine"] = Map(tasks, tasks, mean(cosines))
    if kinds:
        norms = [mean([[found[kind]["norms"]] for found in gradients if kind in found])[0] for kind in kinds]
        drawn["gradients, norm"] = Map(tasks, kinds, _turned(norms), bounded=False)
    for kind, found in weights.items():
        drawn[f"{kind} weights, norm"] = Map(tasks, last["layers"], found["norms"], bounded=False)
    shares = [look["prefix_share"] for look in near if "prefix_share" in look]
    if shares:
        means = [mean([[found[block]] for found in shares if block in found])[0] for block in shares[-1]]
        drawn["attention that goes to the prefix, share"] = Map(tasks, list(shares[-1]), _turned(means))
    if last.get("mixture"):
        drawn["samples, share"] = Map(tasks, list(last["mixture"]), _turned(last["mixture"].values()))
    return drawn


def _turned(columns: Iterable[Sequence[float | None]]) -> Numbers:
    return [list(row) for row in zip(*columns, strict=True)]


def mean(tables: Sequence[Numbers]) -> Numbers:
    """Cell by cell, over the tables that have a number there; None where none has."""

    def cell(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None and math.isfinite(value)]
        return sum(known) / len(known) if known else None

    return [[cell(values) for values in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]


def _largest(values: Numbers) -> float:
    return max((abs(v) for row in values for v in row if v is not None and math.isfinite(v)), default=0.0)


def _newest(samples: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """(task, key) -> answer, of the last validation that showed any of the task."""
    last = {sample["task"]: sample["step"] for sample in samples}
    return {(s["task"], s["key"]): s for s in samples if s["step"] == last[s["task"]]}


def _card(answers: Sequence[tuple[Shown, Mapping[str, Any]]]) -> Html:
    run, first = answers[0]
    wanted = first["references"] or [first["target"]]
    said = []
    for run, answer in answers:
        right = "right" if answer["prediction"].strip() in wanted else None
        name = tag("span", f"{run.mark} ", class_=f"mark tone{run.tone % TONES}") if run.mark else None
        text = tag("strong", answer["prediction"] or "(nothing)", class_=right)
        said.append(tag("p", name, text, tag("span", f" at step {number(answer['step'])}", class_="quiet")))
    picture = next((found for run, answer in answers if (found := _picture(run.files.folder, answer))), None)
    return tag(
        "article",
        picture,
        tag("p", first["source"]),
        *said,
        tag("p", "reference: " + " / ".join(wanted), class_="quiet"),
        class_="example",
    )


def _picture(folder: Path, answer: Mapping[str, Any]) -> Html | None:
    """The picture of an answer, small and inside the page; None if the run's folder has none."""
    if not answer.get("picture"):
        return None
    file = (folder / answer["picture"]).resolve()
    if not file.is_relative_to(folder.resolve()) or not file.is_file():
        return None
    small = io.BytesIO()
    try:
        with Image.open(file) as picture:
            shown = picture.convert("RGB")
    except UnidentifiedImageError:
        return None
    shown.thumbnail((_THUMBNAIL, _THUMBNAIL))
    shown.save(small, "WEBP", quality=80)
    text = base64.b64encode(small.getvalue()).decode()
    return tag("img", src=f"data:image/webp;base64,{text}", alt=f"picture {answer['image']}")
