"""The commands as a user types them: one line for what is wrong, and a finished run put to use."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT, free_port, overrides

from hyperpelt_ds import recipes


def script(name: str) -> ModuleType:
    """launch/<name>.py as a module; `launch` is no package."""
    if str(ROOT / "launch") not in sys.path:
        sys.path.insert(0, str(ROOT / "launch"))
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls an entry point in this process: `call(function, *arguments)` -> (exit code, stdout, stderr)."""

    def run(function, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        try:
            script("command").run(function)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def train(call, config, tmp_path):
    """Calls launch/train.py with the tiny run and whatever is given in addition."""

    def run(*arguments: object, recipe: str = "demo", ds_config: str = "ds_configs/zero2_cpu.json"):
        common = ("--recipe", recipe, "--ds_config", ds_config, "--run_dir", tmp_path / "run", *overrides(config))
        return call(script("train").train, *common, *arguments)

    return run


@pytest.mark.parametrize("arguments, message", [
    (["--recipe", "demo", "--ds_confg", "x"], "unknown flag --ds_confg; did you mean --ds_config"),
    (["--recipe", "demo"], "missing --ds_config, --run_dir; --help shows an example"),
    (["--recipe=demo", "--ds_config=x", "--run_dir=y", "--resume=maybe"], "--resume is a switch"),
    (["--recipe=demo", "--ds_config=x", "--run_dir", "--resume"], "--run_dir needs a value"),
    (["--recipe=demo", "--ds_config=x", "--run_dir"], "--run_dir needs a value"),
])  # fmt: skip
def test_a_wrong_flag_is_one_line(call, arguments, message):
    code, _, err = call(script("train").train, *arguments)
    assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("changes, arguments, message", [
    ({"recipe": "dmo"}, [], "unknown recipe 'dmo'; did you mean demo?"),
    ({"ds_config": "ds_configs/zero9.json"}, [], "ds_configs/zero9.json: no such file"),
    ({}, ["train.stps=3"], "unknown key of train: 'stps'; did you mean steps"),
    ({}, ["trian.steps=3"], "unknown section: 'trian'; did you mean train"),
    ({}, ["train.steps=many"], "train.steps: expected int, got 'many'"),
    ({}, ["steps"], "expected section.key=value"),
    ({}, ["data.tasks=movie_sentimant"], "'movie_sentimant'"),
    ({}, ["data.manifest=nowhere/manifest.json"], "nowhere/manifest.json"),
    ({}, ["vision.encoder=null"], "task 'easy_vqa' needs images, but vision.encoder is not set"),
    ({}, ["train.micro_batch=3"], "not a multiple of train.micro_batch 3; micro-batches that fit: [1, 2, 4, 8]"),
])  # fmt: skip
def test_a_wrong_request_is_one_line_before_any_training(train, tmp_path, changes, arguments, message):
    code, _, err = train(*arguments, **changes)
    assert code == 2, err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_used_run_dir_is_refused_without_resume(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    code, _, err = train()
    assert code == 2 and "is not empty; give --resume" in err


def test_an_error_under_the_launcher_is_said_once_and_ends_all_ranks(run_python, config, tmp_path):
    done = run_python(
        *("deepspeed", "--master_port", free_port(), "--num_accelerators", 2, "launch/train.py", "--recipe", "demo"),
        *("--ds_config", "ds_configs/zero2_cpu.json", "--run_dir", tmp_path / "run", *overrides(config)),
        "data.tasks=movie_sentiment,movie_ratin",
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error")]
    assert done.returncode == 2 and len(said) == 1 and "'movie_ratin'" in said[0]
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("text", ["good, bad", "1e3", 'what\'s "this"?', "[1, 2]", "--dashes", "None", "a=b"])
def test_a_text_reaches_its_command_as_it_was_typed(call, text):
    seen = []

    def command(*rest: str, text: str, number: int = 0, switch: bool = False) -> None:
        seen.append((rest, text, number, switch))

    assert call(command, "--text", text, "--switch", "a=1,2", "--number=-3") == (0, "", "")
    assert seen == [(("a=1,2",), text, -3, True)]


def test_a_word_too_many_is_refused_before_anything_runs(call):
    ran = []

    def command(*, text: str) -> None:
        ran.append(text)

    code, _, err = call(command, "--text", "good", "film")
    assert code == 2 and "unexpected 'film'" in err and not ran


def test_a_librarys_value_error_keeps_its_traceback(call):
    def command() -> None:
        json.loads("{")

    with pytest.raises(ValueError):
        call(command)


def test_generate_prints_one_answer_and_names_an_unknown_task(call, finished_run):
    function, run_dir = script("generate").generate, finished_run(2)
    code, out, err = call(
        function, "--run_dir", run_dir, "--task", "movie_rating", "--text", "the film is good, not bad"
    )
    assert code == 0 and out.endswith("\n")
    code, out, err = call(function, "--run_dir", run_dir, "--task", "movie_ratng", "--text", "good")
    assert code == 2 and "error: unknown task 'movie_ratng'" in err
    code, out, err = call(function, "--run_dir", run_dir / "best", "--task", "movie_rating", "--text", "good")
    assert code == 2 and "no config.json" in err


def test_evaluate_writes_every_column_and_prints_the_table(call, finished_run, tmp_path):
    code, out, err = call(script("evaluate").evaluate, "--run_dir", finished_run(2), "--out", tmp_path / "r.json")
    assert code == 0, err
    results = json.loads((tmp_path / "r.json").read_text())
    assert list(results["tasks"]) == ["movie_sentiment", "movie_rating", "easy_vqa", "shape_caption"]
    assert 0 < results["trainable"] < results["total"] and results["seconds"] > 0
    for name, row in results["tasks"].items():
        assert {"metrics", "score", "low", "high", "baseline", "bag_of_words", "shuffled_task", "shuffled_image",
                "shuffled_n", "n", "truncated", "unreadable", "left_out", "groups"} == row.keys()  # fmt: skip
        assert row["n"] == 12 and 0 <= row["low"] <= row["score"] <= row["high"] <= 1
        assert (row["bag_of_words"] is None) == (row["shuffled_image"] is not None), "text has words, vision has images"
        assert name in out
    groups = results["tasks"]["easy_vqa"]["groups"]
    assert {group: part["n"] for group, part in groups.items()} == {"color": 6, "shape": 6}
    assert results["tasks"]["easy_vqa"]["score"] == pytest.approx(np.mean([part["score"] for part in groups.values()]))


@pytest.mark.parametrize("arguments, message", [
    (["--tasks", "easy_vq"], "task 'easy_vq' is not one of"),
    (["--split", "tset"], "has no split 'tset'"),
])  # fmt: skip
def test_evaluate_names_an_unknown_task_and_split(call, finished_run, arguments, message):
    code, _, err = call(script("evaluate").evaluate, "--run_dir", finished_run(2), *arguments)
    assert code == 2 and message in err


@pytest.mark.slow
def test_two_ranks_score_what_one_does(call, run_python, finished_run, tmp_path):
    one, two = tmp_path / "1.json", tmp_path / "2.json"
    tasks = "movie_rating,easy_vqa"
    call(script("evaluate").evaluate, "--run_dir", finished_run(2), "--tasks", tasks, "--out", one)
    done = run_python(
        *("deepspeed", "--master_port", free_port(), "--num_accelerators", 2, "launch/evaluate.py"),
        *("--run_dir", finished_run(2), "--tasks", tasks, "--out", two),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(one.read_text())["tasks"] == json.loads(two.read_text())["tasks"]
    assert done.stdout.count("shuffled image") == 1, "the table is printed once"


@pytest.mark.slow
def test_torchrun_trains_as_the_deepspeed_launcher_does_and_resume_starts_in_a_new_folder(
    run_python, config, finished_run, tmp_path
):
    done = run_python(
        *("torchrun", "--nproc_per_node", 2, "--master_port", free_port(), "launch/train.py", "--recipe", "demo"),
        *("--ds_config", "ds_configs/zero2_cpu.json", "--run_dir", tmp_path / "run", "--resume"),
        *(*overrides(config), "model.dropout=0.1"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [
        [line["train/loss"] for line in map(json.loads, (run / "metrics.jsonl").open()) if "train/loss" in line]
        for run in (tmp_path / "run", finished_run(2))
    ]
    assert losses[0] == losses[1]


def test_a_recipe_names_itself_and_passes_its_own_checks(tmp_path):
    for name in recipes.RECIPES:
        assert recipes.get(name).recipe == name
        assert recipes.get(name).override([]) == recipes.get(name)
        assert "ds_configs/" in (recipes.RECIPES[name].__doc__ or ""), "the docstring gives the command"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero2_offload"])
def test_the_deepspeed_files_meant_for_gpus_train_alike_on_cpus_too(run_python, config, finished_run, tmp_path, name):
    done = run_python(
        *("deepspeed", "--num_accelerators", 2, "--master_port", free_port(), "launch/train.py", "--recipe", "demo"),
        *("--ds_config", f"ds_configs/{name}.json", "--run_dir", tmp_path / "run", *overrides(config)),
        "model.dropout=0.1",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "run" / "step_00000009" / "weights.safetensors").is_file()
    losses = [
        [line["train/loss"] for line in map(json.loads, (run / "metrics.jsonl").open()) if "train/loss" in line]
        for run in (tmp_path / "run", finished_run(2))
    ]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.05)  # bf16 against fp32, the same dropout
    assert losses[0][-1] < losses[0][0]
