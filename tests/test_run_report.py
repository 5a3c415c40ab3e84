"""The page of a run that the launcher trained: all that it observed is there under the run's own names."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import damage
import pytest
from browser import CHROMIUM, browser
from conftest import IMAGE_TASKS, SHAPES, TEXT_TASKS, save_manifest
from PIL import Image, ImageDraw

from hyperpelt_ds.config import Config
from hyperpelt_ds.report.html import number

pytestmark = pytest.mark.slow

TASKS = [*TEXT_TASKS, *IMAGE_TASKS]
HURT = "movie_sentiment/train-000000.tar"
SPOILT = 8
"""Samples of that shard that cannot be read."""


class Reported(NamedTuple):
    folder: Path
    page: Path
    text: str

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def run(
    config: Config,
    train_on_two_ranks: Callable[..., None],
    run_python: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Reported:
    """A run on two ranks with pictures beside its data, some samples of which are spoilt."""
    folder = tmp_path_factory.mktemp("reported")
    manifest = save_manifest(folder / "data")
    _draw(folder / "data" / "pictures")
    for position in range(SPOILT):
        damage.damage(folder / "data", HURT, "flipped data byte", position)
    train_on_two_ranks(config.override([f"data.manifest={manifest}"]), 2, folder / "run")
    done = run_python("python", "launch/report.py", "--run_dir", folder / "run")
    assert done.returncode == 0, done.stderr
    page = folder / "run" / "report.html"
    return Reported(folder / "run", page, page.read_text())


def _draw(folder: Path) -> None:
    folder.mkdir()
    for split, number_ in product(("train", "validation", "test"), range(6)):
        color, shape = SHAPES[number_ % len(SHAPES)]
        image = Image.new("RGB", (64, 64), "white")
        draw = ImageDraw.Draw(image)
        if shape == "triangle":
            draw.polygon([(32, 8), (8, 56), (56, 56)], color)
        else:
            (draw.ellipse if shape == "circle" else draw.rectangle)((12, 12, 52, 52), color)
        image.save(folder / f"{split}-{number_}.png")


def test_every_figure_of_the_run_has_a_curve_or_is_said_to_stay_the_same(run):
    values: dict[str, set[float]] = {}
    for line in run.lines("metrics.jsonl"):
        for name in line.keys() - {"step", "time"}:
            values.setdefault(name, set()).add(line[name])
    assert {f"train/{task}/loss" for task in TASKS} < values.keys()
    same = run.text[run.text.index("The same throughout:") :].partition("</p>")[0]
    for name, found in values.items():
        assert f"<figcaption>{name}</figcaption>" in run.text or f"{name} {number(found.pop())}" in same


def test_maps_show_the_newest_look_task_by_task(run):
    last = run.lines("observations.jsonl")[-1]
    assert sorted(last["tasks"]) == sorted(TASKS)
    for title in (
        "hyper-embeddings (task), cosine",
        "prefix gradients, cosine",
        "adapter weights, norm",
        "attention that goes to the prefix, share",
        "samples, share",
    ):
        assert title in run.text
    for one, other in ((0, 1), (2, 3)):
        cosine = last["weights"]["prefix"]["cosines"][one][other]
        said = f"{cosine:.2f}".replace("-", "−")
        assert f'title="{last["tasks"][one]}, {last["tasks"][other]}: {said}"' in run.text
    norm = last["weights"]["adapter"]["norms"][0][0]
    assert f'title="{last["tasks"][0]}, {last["layers"][0]}: ' in run.text and norm > 0


def test_examples_are_the_last_validations_with_their_pictures(run):
    answers = run.lines("samples.jsonl")
    newest = [answer for answer in answers if answer["step"] == answers[-1]["step"]]
    assert {answer["task"] for answer in newest} == set(TASKS)
    pictured = [answer for answer in newest if answer["task"] in IMAGE_TASKS]
    assert all(answer["picture"] for answer in pictured)
    assert run.text.count("<img ") == len(pictured)
    for answer in newest:
        assert f"<p>{answer['source']}</p>" in run.text


def test_samples_that_could_not_be_used_are_counted_by_shard(run):
    files = [f"holes/{file.name}" for file in (run.folder / "holes").glob("rank_*.jsonl")]
    holes = [hole for name in files for hole in run.lines(name)]
    assert holes and {hole["shard"] for hole in holes} == {HURT}
    assert run.lines("metrics.jsonl")[-2]["data/holes"] == len(holes)
    assert f"{len(holes)} times a sample was drawn that could not be used" in run.text
    assert f"<td>{HURT}</td>" in run.text


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian package chromium)")
def test_a_browser_shows_all_of_it_within_its_window(run, tmp_path):
    with browser(tmp_path / "profile") as tab:
        for width in (400, 1400):
            tab.show(run.page.as_uri(), width)
            assert tab.ask("document.documentElement.scrollWidth") <= width
            assert set(tab.ask("[...document.images].map(image => image.naturalWidth)")) == {64}
            height = tab.ask("document.documentElement.scrollHeight")
            tab.show(run.page.as_uri(), width, height)
            tab.picture(tmp_path / f"{width}.png")
        assert tab.complaints == []
