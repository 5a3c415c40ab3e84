"""Some of a validation's answers, in turn, for people to read: as lines, as text, and with their pictures.

It must not know how answers were made or how they are scored, nor where what it makes is written.
"""

from __future__ import annotations

import html
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data.manifest import PICTURES
from hyperpelt_ds.train import figures

EACH = 4
"""Answers of a task that are shown at a validation."""
SIDE = 256
"""Pixels that the longer side of a kept picture has at most."""

Answer = tuple[Sample, str]

log = logging.getLogger(__name__)


def choose(answers: Sequence[Answer], turn: int, each: int = EACH) -> dict[str, list[Answer]]:
    """By task, the `each` answers that are `turn`'s, so that all are shown before one is shown again."""
    by_task: dict[str, list[Answer]] = {}
    for answer in sorted(answers, key=lambda answer: (answer[0].task, answer[0].key)):
        by_task.setdefault(answer[0].task, []).append(answer)
    return {
        task: [own[(turn * each + i) % len(own)] for i in range(min(each, len(own)))] for task, own in by_task.items()
    }


def keep_pictures(chosen: Mapping[str, Sequence[Answer]], source: Path, run_dir: Path) -> dict[str, str]:
    """Copies the pictures of the samples' images, made small, to run_dir/pictures; image id -> path within run_dir.

    They are looked for in `source`, as files named by the image ids; those that are not there are left out.
    """
    kept = {}
    for image in {sample.image for own in chosen.values() for sample, _ in own if sample.image is not None}:
        found = next((file for end in (".png", ".jpg", ".jpeg") if (file := source / f"{image}{end}").is_file()), None)
        target = f"{PICTURES}/{quote(image, safe='')}.png"
        if found is not None and not (run_dir / target).is_file():
            _shrink(found, run_dir / target)
        if (run_dir / target).is_file():
            kept[image] = target
    return kept


def _shrink(source: Path, target: Path) -> None:
    """Writes a picture small, if it can be read."""
    small = _opened(source)
    if small is not None:
        small.thumbnail((SIDE, SIDE))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        small.save(partial, "png")
        os.replace(partial, target)


def _opened(file: Path) -> Image.Image | None:
    """A picture; None, with a warning, for one that cannot be read: training does not need it."""
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        log.warning("not shown with the answers: picture %s cannot be read: %s", file, error)
        return None


def lines(step: int, chosen: Mapping[str, Sequence[Answer]], pictures: Mapping[str, str]) -> list[dict[str, Any]]:
    """What samples.jsonl holds (docs/monitoring.md)."""
    return [
        {
            "step": step,
            "task": task,
            "key": sample.key,
            "source": sample.source,
            "prediction": text,
            "target": sample.target,
            "references": list(sample.references),
            "image": sample.image,
            "picture": pictures.get(sample.image or ""),
        }
        for task, own in chosen.items()
        for sample, text in own
    ]


def texts(chosen: Mapping[str, Sequence[Answer]]) -> dict[str, str]:
    """By task, a list in Markdown. No table: TensorBoard breaks the words of a narrow column."""
    return {
        task: "".join(
            f"- {_plain(sample.source)}\n    - answered: **{_plain(text) or 'nothing'}**\n"
            f"    - expected: **{_plain(_expected(sample))}**\n"
            for sample, text in own
        )
        for task, own in chosen.items()
    }


def drawings(
    chosen: Mapping[str, Sequence[Answer]], pictures: Mapping[str, str], run_dir: Path
) -> dict[str, np.ndarray]:
    """By task, the pictures with what was asked, answered and expected; only of tasks that have some."""
    found = {}
    for task, own in chosen.items():
        entries = []
        for sample, text in own:
            if sample.image is not None and sample.image in pictures:
                said = [sample.source, f"answered: {text}", f"expected: {_expected(sample)}"]
                picture = _opened(run_dir / pictures[sample.image])
                entries += [(picture, said)] if picture else []
        if entries:
            found[task] = figures.answers(entries)
    return found


def _expected(sample: Sample) -> str:
    return " / ".join(dict.fromkeys(sample.references or [sample.target]))


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+.!|~-])", r"\\\1", html.escape(" ".join(text.split())))
