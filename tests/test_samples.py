"""Which answers are shown, with which pictures, and how."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.train import figures, samples

ANSWERS = [(Sample(f"k{i}", task, f"q{i}", f"t{i}"), f"p{i}") for task in ("b", "a") for i in range(5)]


def test_answers_take_turns_until_all_were_shown():
    turns = [samples.choose(ANSWERS, turn, each=2) for turn in range(5)]
    assert all(list(turn) == ["a", "b"] for turn in turns)
    shown = [sample.key for turn in turns for sample, _ in turn["a"]]
    assert sorted(shown) == sorted(2 * [f"k{i}" for i in range(5)]) and len(set(shown[:5])) == 5
    assert samples.choose(ANSWERS[::-1], 1) == samples.choose(ANSWERS, 1), "whichever rank answered"
    assert len(samples.choose(ANSWERS, 0, each=9)["a"]) == 5


def test_pictures_are_kept_small_beside_the_run_and_those_that_are_missing_are_not(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (1000, 500), (0, 0, 255)).save(tmp_path / "pictures" / "x 1.jpg")
    chosen = {"t": [(Sample(key, "t", "q", "", image=key), "p") for key in ("x 1", "gone")] + ANSWERS[:1]}
    run = tmp_path / "run"
    kept = samples.keep_pictures(chosen, tmp_path / "pictures", run)
    assert kept == {"x 1": "pictures/x%201.png"}
    assert Image.open(run / kept["x 1"]).size == (256, 128)
    lines = samples.lines(3, chosen, kept)
    assert [line["picture"] for line in lines] == ["pictures/x%201.png", None, None]
    assert json.loads(json.dumps(lines[0])) == {
        "step": 3, "task": "t", "key": "x 1", "source": "q", "prediction": "p", "target": "", "references": [],
        "image": "x 1", "picture": "pictures/x%201.png",
    }  # fmt: skip
    [drawn] = samples.drawings(chosen, kept, run).values()
    assert tuple(drawn[130, 130]) == (0, 0, 254) or drawn[130, 130, 2] > 200
    assert samples.drawings({"t": ANSWERS[:1]}, {}, run) == {}


def test_a_picture_that_cannot_be_read_is_left_out_and_stops_nothing(tmp_path, caplog):
    """They are for people only: neither a bad file of the data set nor one that a killed run left cut."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "bad.png").write_bytes(b"no picture")
    Image.new("RGB", (9, 9)).save(tmp_path / "pictures" / "good.png")
    chosen = {"t": [(Sample(key, "t", "q", "", image=key), "p") for key in ("bad", "good", "cut")]}
    run = tmp_path / "run"
    (run / "pictures").mkdir(parents=True)
    (run / "pictures" / "cut.png").write_bytes((tmp_path / "pictures" / "good.png").read_bytes()[:40])
    kept = samples.keep_pictures(chosen, tmp_path / "pictures", run)
    assert kept == {"good": "pictures/good.png", "cut": "pictures/cut.png"}
    assert list(samples.drawings(chosen, kept, run)) == ["t"]
    assert "bad.png cannot be read" in caplog.text and "cut.png cannot be read" in caplog.text


def test_markdown_in_an_answer_is_shown_and_not_obeyed():
    text = samples.texts({"t": [(Sample("k", "t", "*a*\n# b", "c", references=("c", "d", "c")), "")]})["t"]
    assert text == "- \\*a\\* \\# b\n    - answered: **nothing**\n    - expected: **c / d**\n"


def test_a_heat_map_has_the_colours_of_its_numbers():
    drawn = figures.heat_map("title", ["a", "b"], ["x", "y"], [[1.0, -1.0], [0.0, None]], signed=True)
    colours = {tuple(colour) for colour in drawn.reshape(-1, 3).tolist()}
    assert drawn.dtype == np.uint8 and {figures.WARM, figures.COLD, figures.MISSING, figures.PAPER} <= colours
    plain = figures.heat_map("title", ["a"], ["x", "y"], [[3.0, 5.0]], signed=False)
    colours = {tuple(colour) for colour in plain.reshape(-1, 3).tolist()}
    assert figures.WARM in colours and figures.COLD not in colours


def test_bars_are_as_long_as_their_shares():
    drawn = figures.bars("title", ["a", "b"], {"planned": [0.5, 0.25], "drawn": [0.5, 0.25]})
    long, short = ((drawn == figures.SERIES[0]).all(-1).sum(1)[rows].max() for rows in (slice(70, 86), slice(110, 130)))
    assert abs(long / short - 2) < 0.05
