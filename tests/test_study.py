"""The study: its plan says what it promises, its statistics are right, and its runner loses and repeats nothing."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import test_launch
import transformers
from conftest import overrides

from hyperpelt_ds.counts import estimate
from hyperpelt_ds.study import cells, claims, costs, plan, report, runner
from hyperpelt_ds.study import records as chosen
from hyperpelt_ds.study.plan import METHODS, Cell, Suite
from hyperpelt_ds.study.statistics import Bootstrap, Figure, point, verdict

call, script = test_launch.call, test_launch.script
SHORT = {f"grid/{name}/{rate:g}": 0.6 if rate == 1e-3 else 0.5 for name in METHODS for rate in plan.RATES}
LONG = {f"search/{name}/{rate:g}": 0.8 if rate == 1e-3 else 0.7 for name in METHODS for rate in (1e-3, 3e-4)}
GRID = SHORT | LONG


# The plan


@pytest.fixture(scope="module")
def trainables(tmp_path_factory) -> dict[str, int]:
    """Trained parameters of every method beside a model of the demo's shape."""
    folder = tmp_path_factory.mktemp("shape")
    transformers.MarianConfig(
        vocab_size=32000, d_model=256, encoder_layers=6, decoder_layers=2, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=1536, decoder_ffn_dim=1536, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, share_encoder_decoder_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    base = plan.base().override([f"model.backbone={folder}", f"data.tasks={','.join(plan.TASKS)}"])
    return {name: estimate(base.override(method.settings)).trainable for name, method in METHODS.items()}


def test_hyperpelt_trains_at_most_a_tenth_more_than_any_small_method(trainables):
    small = [count for name, count in trainables.items() if name != "full"]
    assert max(small) <= 1.15 * min(small)
    others = [count for name, count in trainables.items() if name not in ("hyperpelt", plan.OWN)]
    for own in (trainables["hyperpelt"], trainables[plan.OWN]):
        assert own <= 1.1 * min(others, key=lambda count: abs(count - own))
    assert trainables["full"] > 10 * max(small)


def test_nothing_but_learning_rates_is_run_before_all_are_known():
    first = plan.small({})
    assert {cell.name.split("/")[0] for cell in first} == {"grid"} and not any(cell.scored for cell in first)
    some = dict(list(GRID.items())[:-1])
    assert {cell.name.split("/")[0] for cell in plan.small(some)} == {"grid", "search"}


def test_the_best_rate_is_the_highest_score_and_an_end_is_extended_once():
    low, middle, high = plan.RATES
    scored = dict.fromkeys((f"grid/mam/{rate:g}" for rate in plan.RATES), 0.5)
    assert plan.rates("mam", scored | {f"grid/mam/{middle:g}": 0.6}) == ([low, middle, high], middle)
    tried, best = plan.rates("mam", scored | {f"grid/mam/{high:g}": 0.6})
    assert tried == [low, middle, high, 1e-2] and best is None
    further = scored | {f"grid/mam/{high:g}": 0.6, "grid/mam/0.01": 0.7}
    assert plan.rates("mam", further) == (tried, 1e-2)
    assert plan.rates("mam", scored)[0] == [1e-4, low, middle, high]  # of equals the lowest rate


def test_the_search_at_full_length_goes_down_as_long_as_the_lowest_rate_is_the_best():
    assert plan.searched("mam", {}) == ([], None)
    assert plan.searched("mam", SHORT) == ([1e-3, 3e-4], None)
    assert plan.searched("mam", GRID) == ([1e-3, 3e-4], 1e-3)
    lower = GRID | {"search/mam/0.0003": 0.9}
    assert plan.searched("mam", lower) == ([1e-3, 3e-4, 1e-4], None)
    assert plan.searched("mam", lower | {"search/mam/0.0001": 0.5}) == ([1e-3, 3e-4, 1e-4], 3e-4)
    assert plan.searched("mam", lower | {"search/mam/0.0001": 0.95, "search/mam/3e-05": 0.96})[1] == 3e-5


def test_every_cell_has_one_name_valid_settings_and_its_promised_seeds():
    known = plan.small(GRID)
    assert len({cell.name for cell in known}) == len(known)
    assert {cell.name.split("/")[0] for cell in known} == set(plan.GROUPS)
    for cell in known:
        if not cell.start:
            plan.base().override(cell.settings)
    names = {cell.name for cell in known}
    for name, method in METHODS.items():
        assert {plan.core_name(name, not method.knows_task, seed) for seed in range(method.seeds)} <= names
        assert {plan.core_name(name, method.knows_task, seed) for seed in range(plan.OTHER_SEEDS)} <= names
        assert method.seeds >= (5 if name in (plan.OWN, "hyperpelt", "shared_adapter", "full") else 3)


def test_no_two_groups_are_run_with_the_same_settings_but_the_cells_of_one_start():
    known = [cell for cell in plan.small(GRID) if not cell.start]
    assert len({cell.settings for cell in known}) == len(known)


# The statistics


def _scores(*tasks: list[list[float]]) -> dict[str, np.ndarray]:
    return {f"task{i}": np.array(own) for i, own in enumerate(tasks)}


def test_the_mean_is_over_tasks_whatever_their_sizes():
    scores = _scores([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]], [[1.0], [1.0]])
    assert point(scores) == 0.75
    boot = Bootstrap({"task0": [0, 1, 2, 3], "task1": [4]}, 200, 0.95)
    assert boot.mean(scores).value == 0.75


def test_the_interval_of_a_mean_is_that_of_the_binomial_for_one_seed():
    random, n, draws = np.random.default_rng(0), 900, 4000
    scores = {"task0": (random.random((1, n)) < 0.3).astype(float)}
    figure = Bootstrap({"task0": list(range(n))}, draws, 0.95).mean(scores)
    p = figure.value
    width = 2 * 1.96 * (p * (1 - p) / n) ** 0.5
    assert figure.high - figure.low == pytest.approx(width, rel=0.08)


def test_samples_of_one_item_count_once_even_across_tasks():
    random, n = np.random.default_rng(0), 400
    own = (random.random((1, n)) < 0.5).astype(float)
    alone = Bootstrap({"task0": list(range(n))}, 2000, 0.95).mean({"task0": own})
    items, twice = list(range(n)), {"task0": own, "task1": own}
    together = Bootstrap({"task0": items, "task1": items}, 2000, 0.95).mean(twice)
    apart = Bootstrap({"task0": items, "task1": [n + i for i in items]}, 2000, 0.95).mean(twice)
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert apart.high - apart.low < 0.8 * (together.high - together.low)


def test_pairing_over_items_narrows_a_difference_and_seeds_widen_it():
    random, n = np.random.default_rng(0), 500
    hard = random.random(n)
    noise = [(hard + 0.02 * random.standard_normal(n) < 0.5).astype(float) for _ in range(6)]
    boot = Bootstrap({"task0": list(range(n))}, 2000, 0.95)
    first, second = {"task0": np.stack(noise[:3])}, {"task0": np.stack(noise[3:])}
    paired = boot.difference(first, second)
    assert paired.high - paired.low < 0.5 * (boot.mean(first).high - boot.mean(first).low)
    apart = {"task0": np.stack([np.zeros(n), np.ones(n), noise[0]])}
    assert boot.mean(apart).high - boot.mean(apart).low > 0.4


def test_equal_scores_differ_by_nothing():
    same = {"task0": np.array([[0.0, 1.0, 1.0]])}
    figure = Bootstrap({"task0": [0, 1, 2]}, 100, 0.95).difference(same, same)
    assert figure == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "figure,said",
    [
        (Figure(0.03, 0.01, 0.05), "better"),
        (Figure(0.005, 0.001, 0.009), "not worse"),
        (Figure(0.03, -0.005, 0.06), "not worse"),
        (Figure(-0.005, -0.009, 0.0), "not worse"),
        (Figure(-0.03, -0.05, -0.01), "worse"),
        (Figure(0.03, -0.02, 0.08), "undecided"),
        (Figure(-0.005, -0.02, -0.001), "undecided"),
    ],
)
def test_what_a_difference_counts_as(figure, said):
    assert verdict(figure, 0.01) == said


def test_scores_survive_being_written():
    scores = [0.0, 1.0, 0.5, 1 / 3]
    assert cells.unpack(cells.pack(scores)) == pytest.approx(scores, abs=0.5 / cells.STEP)


# The runner, on tiny real runs


TASKS = ("movie_sentiment", "easy_vqa")


@pytest.fixture(scope="module")
def suite(config) -> Suite:
    """Two short runs, and one that starts from the first with a new task."""
    short = ("train.steps=3", "train.eval_every=3", "train.save_every=3", f"data.tasks={','.join(TASKS)}")
    own = (*overrides(config), *short)
    found = [
        Cell("grid/a/1", (*own, "train.seed=1"), TASKS, ("task", "image")),
        Cell("grid/a/2", (*own, "train.seed=2"), scored=()),
        Cell(
            "transfer/a", ("train.seed=3", "train.steps=2", "train.eval_every=2", "train.save_every=2"),
            ("movie_rating",), start="grid/a/2", new_task="movie_rating", train="embeddings",
        ),
    ]  # fmt: skip
    return Suite(lambda validation: found, (*TASKS, "movie_rating"), tuple(overrides(config)))


@pytest.mark.slow
def test_a_study_is_run_once_taken_up_again_and_refuses_what_does_not_fit(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "KEPT", ("grid/a/2",))
    out, folder = tmp_path / "out.jsonl", tmp_path / "runs"
    assert runner.run(suite, out, folder, jobs=2, only=["grid"]) == 0
    first = runner.read(out)
    assert {"", "references", "grid/a/1", "grid/a/2"} == set(first)
    record = first["grid/a/1"]
    for task in TASKS:
        assert len(cells.unpack(record["scores"][task])) == 12 == len(first[""]["items"][task])
        assert len(cells.unpack(record["controls"][task]["task"])) == 12
    assert set(record["controls"]["easy_vqa"]) == {"task", "image"}
    assert record["cpu_seconds"] > record["train_cpu_seconds"] > 0 and first["grid/a/2"]["scores"] == {}

    again = [line for line in out.read_text().splitlines(keepends=True) if '"grid/a/1"' not in line]
    out.write_text("".join(again))  # as if killed before it was recorded; its weights are gone too
    assert runner.run(suite, out, folder, jobs=1) == 0
    second = runner.read(out)
    assert second["grid/a/1"]["scores"] == record["scores"], "the same cell gives the same answers"
    assert second["grid/a/2"] == first["grid/a/2"] and set(second["transfer/a"]["scores"]) == {"movie_rating"}
    assert not list(folder.rglob("grid/a/1/**/*.safetensors"))

    lines = out.read_text()
    changed = dataclasses.replace(suite, cells=lambda validation: [Cell("grid/a/1", ("train.seed=9",))])
    with pytest.raises(ValueError, match="grid/a/1 was made with other settings"):
        runner.run(changed, out, folder, jobs=1)
    head = json.loads(lines.splitlines()[0])
    head["items"]["easy_vqa"][0] += 1
    out.write_text("\n".join([json.dumps(head), *lines.splitlines()[1:]]) + "\n")
    with pytest.raises(ValueError, match="other data"):
        runner.run(suite, out, folder, jobs=1)


def test_a_broken_line_is_named(tmp_path):
    file = tmp_path / "out.jsonl"
    file.write_text('{"cell":"a"}\n{"cell":')
    with pytest.raises(ValueError, match=r"out.jsonl, line 2"):
        runner.read(file)


# The page


def _record(name: str, mean: float, random: np.random.Generator) -> dict:
    scores = {task: cells.pack((random.random(50) < mean).astype(float)) for task in plan.TASKS}
    controls = {task: {name: cells.pack([0.0, 1.0] + [0.0] * 8) for name in ("task", "image")} for task in plan.TASKS}
    return {
        "cell": name,
        "validation": mean,
        "trainable": 10**6,
        "cpu_seconds": 36.0,
        "scores": scores,
        "controls": controls,
    }


@pytest.fixture
def records() -> dict[str, dict]:
    random = np.random.default_rng(0)
    head = {"items": {task: [50 * i + n for n in range(50)] for i, task in enumerate(plan.TASKS)}, "hardware": "h"}
    found: dict[str, dict] = {"": head | {"packages": {"torch": "1"}, "groups": {"easy_vqa": ["shape", "yes_no"] * 25}}}
    found |= {name: _record(name, score, random) for name, score in GRID.items()}
    for method, mean in ((plan.OWN, 0.7), ("hyperpelt", 0.69), ("shared_adapter", 0.4), ("full", 0.72)):
        for name in chosen.seeds_of(method, not METHODS[method].knows_task):
            found[name] = _record(name, mean, random)
    return found


def test_the_page_has_the_records_own_figures_and_says_what_is_missing(records):
    page = report.write(records)
    rows: dict[str, list[str]] = {}
    for line in page[page.index("## The comparison") :].splitlines():
        rows.setdefault(line.split(" | ")[0].strip("| *"), line.split(" | "))
    own = chosen.scores_of(records, chosen.seeds_of(plan.OWN, False))
    row = rows["HyperPELT, adapters only, task not named"]
    assert [float(cell) for cell in row[3:8]] == pytest.approx([own[task].mean() for task in plan.TASKS], abs=6e-4)
    assert row[2] == "5 of 5" and rows["adapter, shared by all tasks, task named"][10].strip(" |") == "better"
    full = chosen.scores_of(records, chosen.seeds_of("full", True))
    assert f"reaches {100 * point(own) / point(full):.1f} % of full" in page
    assert "HyperPELT with prefixes minus each other row that is judged: HyperPELT, adapters only -0.0" in page
    assert "not finished" in page and page.count("Not run yet.") >= 2
    assert f"{len(records) - 1} of {len(plan.small(GRID))} runs" in page


def _states(records: dict[str, dict], measured: list[dict]) -> list[str]:
    boot = Bootstrap({task: records[""]["items"][task] for task in plan.TASKS}, 200, 0.95)
    rows = claims.table(records, boot, measured).splitlines()[4:]
    assert [row[2] for row in rows] == list("1234")
    return [row.split(" | ")[1] for row in rows]


def test_a_claim_is_refuted_by_any_of_its_findings_and_decided_only_by_all(records):
    random = np.random.default_rng(2)
    measured = [
        {"system": costs.SYSTEMS[way], "metric": "train_step_s", "ratio": ratio}
        for way, ratio in (("tokens", 1.6), ("weights", 1.3))
    ]
    assert _states(records, measured) == ["not decided yet", "not refuted", "not decided yet", "not decided yet"]
    records["references"] = {"cell": "references", "scores": {"oracle": {"question": cells.pack([0.0, 1.0])}}}
    known = plan.small(GRID)
    for cell in known:
        if cell.name.split("/")[0] in ("core", "image", "transfer") and cell.name not in records:
            records[cell.name] = _record(cell.name, 0.3 if cell.name.startswith("core") else 0.5, random)
        if cell.name.startswith("transfer/all/"):
            records[cell.name] = _record(cell.name, 0.8, random)
    assert _states(records, measured) == ["not refuted", "not refuted", "not refuted", "not refuted"]
    for cell in known:
        if cell.name.startswith(("image/tokens/", "core/mam/")):
            records[cell.name] = _record(cell.name, 0.9, random)
        if cell.name.startswith(("transfer/scratch/", "transfer/all/")):
            records[cell.name] = _record(cell.name, 0.5, random)
    for name in chosen.seeds_of(plan.OWN, False):
        records[name]["controls"]["movie_sentiment"]["task"] = cells.pack([1.0, 1.0, 1.0])
    dearer = _states(records, measured)
    assert dearer == ["**refuted**", "**refuted**", "not refuted", "**refuted**"], "better at a price is a trade"
    measured[0]["ratio"] = 1.3
    assert _states(records, measured)[2] == "**refuted**"


def test_a_method_is_judged_by_the_form_that_validation_prefers(records):
    random = np.random.default_rng(1)
    assert chosen.judged_form(records, "full") is True
    for name in chosen.seeds_of("full", False):
        records[name] = _record(name, 0.9, random)
    assert chosen.judged_form(records, "full") is False
    assert chosen.judged_form(records, "mam") is None


def test_the_command_names_what_is_wrong(call, tmp_path):
    study = script("study").study
    for flags, said in (
        (["--suite", "large"], "unknown suite 'large'"),
        (["--only", "core,extra"], "unknown group 'extra'"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--report_only", "--out", tmp_path / "none.jsonl", "--report", tmp_path / "page.md"], "there are no records"),
    ):
        code, _, errors = call(study, *flags)
        assert code == 2 and said in errors


def test_cost_stands_beside_score_and_the_figure_has_a_point_for_every_way_that_was_run(records):
    lines = [
        {"system": system, "metric": metric, "median": 100.0 + i, "min": 1, "max": 2, "ratio": 1.5, "case": "study",
         "hardware": "h", "threads": 1}
        for i, system in enumerate(costs.SYSTEMS.values()) for metric in costs.METRICS
    ]  # fmt: skip
    page, scores = report.write(records, lines), chosen.image_scores(records)
    assert list(scores) == ["weights"] and f"| weights | {scores['weights']:.3f} | 1.50x" in page
    drawn = costs.image_figure(scores, lines)
    assert drawn.count("<circle") == 1 and f"weights {scores['weights']:.3f}" in drawn
    assert costs.image_figure({}, lines) == "" and "Not measured yet" in report.write(records)


def test_the_extended_suite_has_its_own_page_of_methods_beside_what_the_data_gives_away():
    random = np.random.default_rng(0)
    known = plan.extended({})
    assert len({cell.name for cell in known}) == len(known) == len(plan.EXTENDED_RATES) * plan.EXTENDED_SEEDS
    assert all(set(plan.EXTENDED_DATA) < set(cell.settings) and cell.scored == plan.EXTENDED for cell in known)
    items = {task: [50 * i + n for n in range(50)] for i, task in enumerate(plan.EXTENDED)}
    records: dict[str, dict] = {"": {"items": items, "hardware": "h", "packages": {}}}
    assert "**The study is not finished.**" in report.write_extended(records)
    for cell in known:
        mean = 0.8 if plan.OWN in cell.name else 0.3
        scores = {task: cells.pack(random.random(50) < mean) for task in plan.EXTENDED}
        records[cell.name] = {"cell": cell.name, "trainable": 10**6, "cpu_seconds": 36.0, "scores": scores}
    page = report.write_extended(records)
    assert "not finished" not in page and page.count("| better |") == len(plan.EXTENDED_RATES) - 1
