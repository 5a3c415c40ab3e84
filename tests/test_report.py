"""The page about runs and the few lines in the terminal: read from real files, drawn by a real browser."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path

import pytest
from browser import CHROMIUM, browser
from conftest import ROOT
from PIL import Image

from hyperpelt_ds import config as configuration
from hyperpelt_ds.contracts import Hole
from hyperpelt_ds.report import chart, files, html, page, shown, state, terminal
from hyperpelt_ds.train import outcome
from hyperpelt_ds.train.control import BadSteps
from hyperpelt_ds.train.ledger import Ledger
from hyperpelt_ds.train.metrics import Writer
from hyperpelt_ds.train.supervision import record_process

TASKS = ["movie_sentiment", "easy_vqa"]
LOSSES = {step: 4 * math.exp(-step / 20) + 0.5 for step in range(2, 62, 2)}
SCORES = {20: 0.3, 40: 0.55, 60: 0.6}
WICKED = "<b>bold</b> & <script>document.title = 'taken'</script>"


def write_run(folder: Path, config: configuration.Config, shift: float = 0.0) -> Path:
    """A run as its own writers leave it, the figures moved up by `shift`."""
    writer = Writer(folder, 0)
    configuration.save(config.override(["train.steps=60", f"data.tasks={','.join(TASKS)}"]), folder / "config.json")
    for step, loss in LOSSES.items():
        losses = {"train/loss": loss + shift, "train/easy_vqa/loss": 2 * loss + shift}
        writer.write(
            step,
            {
                **losses,
                "train/learning_rate": 1e-3 * (1 - step / 60),
                "data/holes": 0,
                "data/wait_fraction": loss / 456,
            },
        )
        if step in SCORES:
            writer.write(step, {"eval/easy_vqa/exact_match": SCORES[step], "eval/mean": SCORES[step]})
    writer.close()
    command = ["launch/train.py", "--local_rank=0", "--recipe", "demo", "--run_dir", str(folder), 'data.tasks=["a"]']
    about = {"command": command, "python": "3.11.7", "world_size": 2, "packages": {"torch": "2.14.1"}}
    (folder / "environment.json").write_text(json.dumps(about))
    outcome.write_status(folder, outcome.FINISHED, 60, 0)
    (folder / outcome.DONE).touch()
    return folder


def add_results(folder: Path, score: float) -> None:
    figure = {"score": score, "low": score - 0.05, "high": score + 0.05}
    row = {"metrics": {"exact_match": figure}, **figure, "baseline": 0.25, "n": 1200, "bag_of_words": 0.75}
    row |= {"groups": {"color": {"metrics": {"exact_match": figure}, **figure, "baseline": 0.1, "n": 600}}}
    row |= {"shuffled_task": 0.125, "shuffled_image": None, "shuffled_n": 500}
    row |= {"truncated": 7, "unreadable": 0, "left_out": 0}
    whole = {"tasks": {"easy_vqa": row}, "glue_mean": None, "trainable": 1000, "total": 50000, "split": "test"}
    (folder / "results.json").write_text(json.dumps({**whole, "scoring_seconds": 75.0}))


def add_observations(folder: Path) -> None:
    """What docs/monitoring.md describes: two looks, in the second of which one task had no gradient."""
    cosines = [[[1.0, -0.5], [-0.5, 1.0]], [[1.0, None], [None, None]]]
    for step, gradients in zip((20, 40), cosines, strict=True):
        look = {"step": step, "time": 0.0, "tasks": TASKS, "layers": ["encoder 0", "decoder 0"]}
        look["weights"] = {"prefix": {"norms": [[1.5, 2.5], [3.5, 4.5]], "cosines": [[1.0, 0.8], [0.8, 1.0]]}}
        look["gradients"] = {"prefix": {"norms": [1.0, None], "cosines": gradients}}
        look["mixture"] = {"planned": [0.5, 0.5], "drawn": [0.4, 0.6]}
        with (folder / "observations.jsonl").open("a") as file:
            file.write(json.dumps(look) + "\n")
    (folder / "pictures").mkdir()
    Image.new("RGB", (800, 400), "red").save(folder / "pictures" / "one.png")
    common = {"source": WICKED, "target": "red", "references": [], "image": "i", "picture": "pictures/one.png"}
    with (folder / "samples.jsonl").open("w") as file:
        for step, answer in ((20, "blue"), (40, "red")):
            file.write(
                json.dumps({"step": step, "task": "easy_vqa", "key": "k", "prediction": answer, **common}) + "\n"
            )
        outside = common | {"source": "a question", "picture": "../../secret.png"}
        file.write(json.dumps({"step": 40, "task": "easy_vqa", "key": "l", "prediction": "no", **outside}) + "\n")


def add_faults(folder: Path, config: configuration.Config) -> None:
    Ledger(folder, 60, config.data).write(
        30, [Hole(7, "easy_vqa", "train", 3, "easy_vqa/train-0.tar", WICKED, "crc32")]
    )
    BadSteps(folder, 60, 8).add(44, (344, 352), "not finite", ["movie_sentiment/m7"])


@pytest.fixture
def full_run(tmp_path, config):
    folder = write_run(tmp_path / "first", config)
    add_results(folder, 0.5)
    add_observations(folder)
    add_faults(folder, config)
    return folder


def titles(document: str) -> list[str]:
    return re.findall(r"<title>([^<]+)</title>", document)


def test_the_page_has_every_curve_with_its_points_and_every_section(full_run):
    document = page.page([files.read(full_run)])
    for name in ("train/loss", "train/easy_vqa/loss", "train/learning_rate", "eval/easy_vqa/exact_match", "eval/mean"):
        assert f"<figcaption>{name}</figcaption>" in document
    points = titles(document)
    for step, loss in LOSSES.items():
        assert f"first, step {step}: {html.number(loss)}" in points
    assert {f"first, step {step}: {html.number(score)}" for step, score in SCORES.items()} <= set(points)
    assert "The same throughout: data/holes 0." in document
    sections = ("Scores", "Curves", "Tasks beside each other", "Examples", "Data", "Setup", "Environment")
    assert [name for name in sections if f"<h2>{name}</h2>" not in document] == []
    assert "Left out, since the files have nothing about it: counts." in document


def test_scores_stand_beside_their_baselines(full_run):
    document = page.page([files.read(full_run)])
    row = document[document.index("<td>easy_vqa</td><td>exact_match</td>") :].partition("</tr>")[0]
    cells = re.findall(r'<td class="n">(?:<strong>)?([^<]*)', row)
    assert cells == ["0.500", "0.450 to 0.550", "0.250", "0.750", "0.125", "", "1,200"]
    assert "prior 0.250" in titles(row) and "bag of words 0.750" in titles(row)
    assert "sources cut: 7 of 1,200 in easy_vqa" in document


def test_maps_are_of_the_newest_look_and_gradients_of_all_that_had_the_task(full_run):
    run = files.read(full_run)
    document = page.page([run])
    assert "prefix gradients, cosine" in document and "prefix weights, norm" in document
    assert 'title="movie_sentiment, easy_vqa: −0.50"' in document, "the newest look had no gradient of easy_vqa"
    assert 'title="easy_vqa, decoder 0: 4.50"' in document
    assert "step 40" in document


def test_a_share_of_attention_is_the_mean_of_the_looks_that_had_the_task(full_run):
    lines = [json.loads(line) for line in (full_run / "observations.jsonl").read_text().splitlines()]
    for look, share in zip(lines, ([0.2, 0.6], [0.4, None]), strict=True):
        look["prefix_share"] = {"encoder_self": share}
    (full_run / "observations.jsonl").write_text("".join(json.dumps(look) + "\n" for look in lines))
    document = page.page([files.read(full_run)])
    assert 'title="movie_sentiment, encoder_self: 0.30"' in document
    assert 'title="easy_vqa, encoder_self: 0.60"' in document


def test_a_small_number_of_a_map_is_not_called_zero():
    assert ">0.00<" in chart.matrix(["a"], ["b"], [[0.0]], "map", 1.0)
    assert ">0.31<" in chart.matrix(["a"], ["b"], [[0.31]], "map", 1.0)
    assert f">{html.short(0.0021)}<" in chart.matrix(["a"], ["b"], [[0.0021]], "map", 1.0)


def test_scores_that_are_all_zero_stand_at_the_foot_of_a_scale_to_one():
    drawn = chart.curves("eval/mean", "score", [chart.Line("a", "", 0, [(1, 0.0), (2, 0.0)])], (0.0, 1.0))
    marks = re.findall(r"<text[^>]*>([^<]+)</text>", drawn)
    assert "1" in marks and not any(mark.startswith("−") for mark in marks)


def test_examples_are_of_the_newest_validation_and_pictures_lie_in_the_run(full_run):
    document = page.page([files.read(full_run)])
    assert '<strong class="right">red</strong>' in document and ">blue<" not in document
    assert document.count("<img ") == 1, "a path that leaves the run's folder is no picture of it"
    assert 'src="data:image/webp;base64,' in document


def test_what_comes_from_data_is_never_markup(full_run):
    document = page.page([files.read(full_run)])
    assert "<script" not in document and "<b>" not in document
    assert document.count(escape(WICKED)) >= 2, "a question and a key of the ledger"


def test_runs_side_by_side_share_charts_and_say_what_differs(full_run, config, tmp_path):
    other = write_run(tmp_path / "elsewhere" / "first", config.override(["train.seed=7"]), shift=1.0)
    document = page.page([files.read(full_run), files.read(other)])
    assert document.count("<figcaption>train/loss</figcaption>") == 1
    assert {"A first", "B elsewhere/first"} <= {point.partition(",")[0] for point in titles(document)}
    differing = document[document.index("Settings that differ") :].partition("</table>")[0]
    assert re.findall(r"<code>([^<]+)</code>", differing) == ["train.seed"]
    assert "B elsewhere/first</span> has no results.json yet" in document


def test_a_run_with_figures_only_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "time": 0, "train/loss": 2.0}\n{"step": 3, "time": 1, "train/lo'
    )
    document = page.page([files.read(tmp_path)])
    assert "<h2>Curves</h2>" in document and "<h2>Setup</h2>" not in document
    assert "step 1: 2" in document, "a half-written last line is not yet there"


def test_values_that_are_not_finite_leave_a_gap_and_are_counted(tmp_path):
    writer = Writer(tmp_path, 0)
    for step, loss in enumerate([2.0, math.nan, math.inf, 1.0], 1):
        writer.write(step, {"train/loss": loss})
    writer.close()
    document = page.page([files.read(tmp_path)])
    assert "2 values that are not finite are left out" in document and "nan" not in document.lower()


def test_a_damaged_file_is_named_with_its_line(full_run):
    with (full_run / "metrics.jsonl").open("a") as file:
        file.write("{broken\n")
    lines = len((full_run / "metrics.jsonl").read_text().splitlines())
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, line {lines} cannot be read"):
        files.read(full_run)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no run's folder: it has none of config\.json"):
        files.read(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        page.write([tmp_path / "nowhere"])


def test_the_page_goes_beside_the_first_run_or_where_it_is_wanted(full_run, tmp_path):
    assert page.write([full_run]) == full_run / "report.html"
    assert page.write([full_run], tmp_path / "x.html").read_text().startswith("<!doctype html>")
    with pytest.raises(ValueError, match="there is no folder"):
        page.write([full_run], tmp_path / "no" / "x.html")
    with pytest.raises(ValueError, match="given twice"):
        page.write([full_run, f"{full_run}/"])


def test_the_commands_take_several_runs_and_load_no_torch(full_run, config, tmp_path):
    other = write_run(tmp_path / "second", config)
    for name, *arguments in (("report", "--out", tmp_path / "x.html"), ("status",)):
        code = (
            f"import runpy, sys; sys.argv[0] = 'launch/{name}.py'; sys.path.insert(0, 'launch')\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
        )
        command = [sys.executable, "-c", code, "--run_dir", full_run, other, *arguments]
        done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told = (tmp_path / "x.html").read_text() if name == "report" else done.stdout
        assert "first" in told and "second" in told


def judge(folder: Path, word: str, code: int | None = None) -> state.State:
    (folder / outcome.DONE).unlink(missing_ok=True)
    outcome.write_status(folder, word, 40, code)
    return state.judge(files.read(folder))


@pytest.mark.parametrize("word, code, said", [
    (outcome.FAILED, 1, "exit code 1"),
    (outcome.HUNG, 70, "stack_1.txt say where"),
    ("preempted", 75, "everything saved"),
    ("data", 65, "could not be used"),
])  # fmt: skip
def test_a_run_that_ended_early_says_why_and_how_it_goes_on(full_run, word, code, said):
    (full_run / "stack_1.txt").write_text("rank 1, vm, pid 3, Mon 10:00:01: no progress for 9 s\n\nThread 1\n")
    judged = judge(full_run, word, code)
    assert judged.word == word and said in judged.said
    own = f"launch/train.py --recipe demo --run_dir {full_run} 'data.tasks=[\"a\"]'"
    again = f"deepspeed --num_accelerators 2 {own} --resume"
    assert judged.next.endswith(again)
    told = terminal.text(files.read(full_run))
    assert "step 60 of 60" in told and "stack_1.txt: no progress for 9 s" in told and again in told


def test_a_run_is_running_as_long_as_one_of_its_processes_is(full_run):
    record_process(full_run, 0)
    judged = judge(full_run, outcome.RUNNING)
    assert judged.word == outcome.RUNNING and f"process {os.getpid()}" in judged.said and judged.next == "wait"
    record = full_run / "processes" / "rank_0.json"
    record.write_text(record.read_text().replace('"start": ', '"start": 1'))  # the number is another process's now
    judged = judge(full_run, outcome.RUNNING)
    assert judged.word == state.ENDED and judged.next.endswith("--resume")
    record.write_text(json.dumps({"host": "another-machine", "pid": 1, "start": 1}))
    judged = judge(full_run, outcome.RUNNING)
    assert judged.word == state.UNKNOWN and "another-machine" in judged.said


@pytest.mark.parametrize("change, expected", [
    ({"world_size": 1, "command": ["launch/train.py", "a=1"]}, "python launch/train.py a=1 --resume"),
    ({"command": ["launch/train.py", "--resume"]}, "torchrun --nproc_per_node 2 launch/train.py --resume"),
    ({"command": []}, "give its command again, with --resume"),
])  # fmt: skip
def test_the_command_that_goes_on_is_of_the_launcher_that_began(full_run, change, expected):
    about = json.loads((full_run / "environment.json").read_text())
    (full_run / "environment.json").write_text(json.dumps(about | change))
    assert state.resume(files.read(full_run)) == expected


def test_a_finished_run_is_to_be_scored_and_then_looked_at(tmp_path, config):
    folder = write_run(tmp_path / "my run", config)
    assert state.judge(files.read(folder)).next == f"python launch/evaluate.py --run_dir '{folder}'"
    add_results(folder, 0.5)
    assert state.judge(files.read(folder)).next == f"python launch/report.py --run_dir '{folder}'"


def test_status_tells_of_holes_and_bad_steps_on_one_screen(full_run):
    text = terminal.text(files.read(full_run))
    assert "1, 1 of them in easy_vqa/train-0.tar" in text and "the last 44: not finite" in text
    assert len(text.splitlines()) < 20


def test_remaining_time_is_that_of_the_newest_pace(tmp_path, config):
    folder = write_run(tmp_path / "run", config)
    lines = [{"step": s, "time": 1000.0 + 3 * s, "train/learning_rate": 0.1} for s in range(1, 31)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert state.remaining(files.read(folder)) == pytest.approx(90.0)


@pytest.mark.parametrize("value, text", [
    (0, "0"), (1234567, "1,234,567"), (0.70712, "0.7071"), (0.5, "0.5"), (-12.345, "−12.35"), (3e-4, "3e−4"),
    (1.23456e9, "1,234,560,000"), (None, "–"), (float("nan"), "nan"),
])  # fmt: skip
def test_numbers_have_the_digits_that_matter(value, text):
    assert html.number(value) == text


@pytest.mark.parametrize("value, text", [
    (0.12345, "0.123"), (0.00989, "9.9e−3"), (0, "0"), (9000, "9,000"), (12345, "12.3k"), (1_250_000, "1.25M"),
    (-3e9, "−3G"),
])  # fmt: skip
def test_short_numbers_fit_beside_an_axis(value, text):
    assert html.short(value) == text


@pytest.mark.parametrize("seconds, text", [(5, "5 s"), (65, "1 min 5 s"), (3600, "1 h"), (93600, "1 d 2 h")])
def test_times_have_two_units(seconds, text):
    assert html.duration(seconds) == text


def test_a_long_curve_keeps_its_extremes_its_ends_and_its_order():
    points = [(step, math.sin(step / 50)) for step in range(5000)]
    points[1234] = (1234, 9.0)
    points[4321] = (4321, -9.0)
    kept = chart.thinned(points)
    assert len(kept) < 250 and kept == sorted(kept)
    assert {points[0], points[-1], points[1234], points[4321]} <= set(kept) <= set(points)


@pytest.mark.parametrize("low, high", [(0, 1), (-3, 7), (0.0123, 0.0131), (5, 50000), (1e-9, 3e-9)])
def test_ticks_are_few_round_and_within(low, high):
    found = chart.ticks(low, high)
    assert 2 <= len(found) <= 7 and all(low - 1e-12 <= tick <= high + 1e-12 for tick in found)


def test_names_of_runs_differ():
    def run(path: str) -> files.RunFiles:
        empty = files.RunFiles.__dataclass_fields__
        return files.RunFiles(**{name: None for name in empty} | {"folder": Path(path)})

    names = [each.name for each in shown.together([run("/a/x/run"), run("/a/y/run"), run("/a/y/other")])]
    assert names == ["x/run", "y/run", "y/other"]
    assert [each.mark for each in shown.together([run(f"/r{i}") for i in range(28)])][-3:] == ["Z", "AA", "AB"]


def test_the_styles_are_plain_enough_for_their_page():
    assert "http" not in page.CSS and "url(" not in page.CSS


@pytest.mark.slow
def test_a_real_run_has_its_page_and_its_word(finished_run, run_python, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished_run(2), folder)
    run = files.read(folder)
    assert state.judge(run).word == outcome.FINISHED and run.checkpoint is not None and run.best is not None
    done = run_python("python", "launch/evaluate.py", "--run_dir", folder)
    assert done.returncode == 0, done.stderr
    done = run_python("python", "launch/report.py", "--run_dir", folder)
    assert done.returncode == 0 and done.stdout.strip() == str(folder / "report.html"), done.stderr
    document = (folder / "report.html").read_text()
    results = json.loads((folder / "results.json").read_text())
    for task, row in results["tasks"].items():
        assert f"<figcaption>train/{task}/loss</figcaption>" in document
        assert f"<td>{task}</td>" in document and f"<strong>{row['score']:.3f}</strong>" in document
    assert f"<strong>{results['trainable']:,}</strong>" in document, "counted from the checkpoint, as the model counts"
    assert "<h2>Environment</h2>" in document and "launch/train.py" in document
    told = run_python("python", "launch/status.py", "--run_dir", folder)
    assert told.returncode == 0 and "finished; done" in told.stdout and "step_00000009" in told.stdout


POINTS = """[...document.querySelectorAll('figure.chart')].map(figure => ({
    name: figure.querySelector('figcaption').textContent,
    points: [...figure.querySelectorAll('.target')].map(point => {
        const box = point.getBoundingClientRect();
        return [point.querySelector('title').textContent, box.x + box.width / 2, box.y + box.height / 2];
    }),
    length: Math.max(...[...figure.querySelectorAll('path.curve')].map(path => path.getTotalLength())),
    width: figure.querySelector('svg').getBoundingClientRect().width,
}))"""

# Every element with a text of its own: its colour against what lies behind it, as contrasts are computed in WCAG 2.
FAINT = """(() => {
    const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
    const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
    const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b; };
    const ground = element => { if (!element) return [255, 255, 255];
        const own = parse(getComputedStyle(element).backgroundColor);
        return own[3] === 1 ? own.slice(0, 3) : over(own, ground(element.parentElement)); };
    const faint = [];
    for (const element of document.body.querySelectorAll('*')) {
        if (![...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
        if (['title', 'TITLE', 'STYLE'].includes(element.tagName) || !element.getClientRects().length) continue;
        const style = getComputedStyle(element), behind = ground(element);
        const a = light(over(parse(element.tagName === 'text' ? style.fill : style.color), behind)), b = light(behind);
        const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        if (contrast < 4.5) faint.push([element.tagName, element.textContent.slice(0, 40), contrast]);
    }
    return faint;
})()"""

CLIPPED = """[...document.querySelectorAll('svg text')].filter(text => {
    const box = text.getBoundingClientRect(), svg = text.closest('svg').getBoundingClientRect();
    return box.width && (box.right > svg.right + 1 || box.left < svg.left - 1 || box.bottom > svg.bottom + 1);
}).map(text => text.textContent)"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian package chromium)")
def test_a_browser_draws_the_page_in_every_window_and_light_and_loads_nothing_else(full_run, config, tmp_path):
    other = write_run(tmp_path / "a_second_run_with_a_longer_name", config, shift=1.0)
    file = page.write([full_run, other], tmp_path / "page.html")
    grounds = {}
    with browser(tmp_path / "profile") as tab:
        for width in (360, 1400):
            for dark in (False, True):
                tab.show(file.resolve().as_uri(), width, dark=dark)
                grounds[dark] = tab.ask("getComputedStyle(document.body).backgroundColor")
                wide = tab.ask("document.documentElement.scrollWidth")
                assert wide <= width, f"the page is {wide} wide in a window of {width}"
                assert tab.ask(FAINT) == [] and tab.ask(CLIPPED) == []
                assert tab.ask("[...document.images].map(i => [i.naturalWidth, i.naturalHeight])") == [[256, 128]]
                charts = {figure["name"]: figure for figure in tab.ask(POINTS)}
                points = charts["train/loss"]["points"]
                assert charts["train/loss"]["length"] > 100 and charts["train/loss"]["width"] > 250
                assert len(points) == 2 * len(LOSSES)
                own = points[: len(LOSSES)]
                assert [text for text, _, _ in own] == [
                    f"A first, step {s}: {html.number(v)}" for s, v in LOSSES.items()
                ]
                places = [(x, y) for _, x, y in own]
                assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(places)), "it falls"
                assert all(above[2] < below[2] for above, below in zip(points[len(own) :], own, strict=True))
        assert tab.ask("document.title") == "first · a_second_run_with_a_longer_name – report"
        assert tab.ask("document.querySelectorAll('script, b').length") == 0
        assert tab.complaints == []
        loaded = {address for address in tab.requests if not address.startswith(("data:", "about:"))}
        assert loaded == {file.resolve().as_uri()}
    assert grounds[False] != grounds[True]
