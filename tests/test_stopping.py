"""Whole trainings that are stopped, spoilt, made to diverge or to hang: what all ranks do, and what is left of them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CELLS, CHANNELS, ROOT, TEXT_TASKS, free_port, overrides
from damage import rewrite
from test_control import environment, wait_for
from test_train import figures, final_weights

from hyperpelt_ds.config import Config, save
from hyperpelt_ds.train import outcome

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}},
    "float16": {"torch_autocast": {"enabled": True, "dtype": "float16", "lower_precision_safe_modules": []}},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 16, "hysteresis": 1}},
}

Start = Callable[..., subprocess.Popen[bytes]]


def deepspeed(*arguments: object) -> list[str]:
    return [str(a) for a in ("deepspeed", "--master_port", free_port(), "--num_accelerators", 2, *arguments)]


def training(config: Config, run_dir: Path, *changes: str, ds_config: str = "zero2_cpu") -> list[str]:
    where = ("--ds_config", f"ds_configs/{ds_config}.json", "--run_dir", run_dir)
    return deepspeed("launch/train.py", "--recipe", "demo", *where, *overrides(config), *changes)


def in_session(leader: int) -> list[int]:
    """The processes that the one with this number began, directly or not."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(file.parent.name))
    return found


@pytest.fixture
def start(tmp_path) -> Iterator[Start]:
    """Starts a command in a session of its own; what is left of it is ended after the test."""
    children = []

    def run(command: list[str]) -> subprocess.Popen[bytes]:
        with (tmp_path / f"output{len(children)}").open("wb") as output:
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=output, stderr=output, start_new_session=True
            )
        children.append(child)
        return child

    yield run
    for child in children:
        for process in in_session(child.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        child.wait()


def process_of(run_dir: Path, rank: int) -> int:
    return json.loads((run_dir / "processes" / f"rank_{rank}.json").read_text())["pid"]


def latest(run_dir: Path) -> int:
    return int((run_dir / "LATEST").read_text().strip().removeprefix("step_"))


def said(run_dir: Path, text: str) -> bool:
    file = run_dir / "metrics.jsonl"
    return file.is_file() and text in file.read_text()


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "the first step": lambda run: outcome.read_status(run) is not None,
    "training": lambda run: said(run, '"step": 20,'),
    "a validation": lambda run: said(run, '"step": 6,'),
    "saving": lambda run: bool(list(run.glob("step_*.partial"))) and said(run, '"step": 4,'),
}
CHANGES = {
    "a validation": ("train.eval_every=6", "eval.batch_size=1", "eval.samples_per_task=0"),
    "saving": ("train.save_every=1",),
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_rank_at_any_moment_saves_everything_and_leaves_nothing(start, config, tmp_path, moment, rank):
    run = tmp_path / "run"
    endless = ("train.steps=100000", "train.eval_every=100000", "train.save_every=100000", "data.workers=2")
    child = start(training(config, run, *endless, *CHANGES.get(moment, ())))
    wait_for(lambda: MOMENTS[moment](run), child)
    os.kill(process_of(run, rank), signal.SIGTERM)
    assert child.wait(60) == 75, (tmp_path / "output0").read_text()[-4000:]
    assert in_session(child.pid) == []
    status = outcome.read_status(run)
    assert (status["state"], status["code"]) == ("preempted", 75) and not (run / "DONE").exists()
    reached = max(figures(run, "train/learning_rate"), default=0) if (run / "metrics.jsonl").exists() else 0
    assert latest(run) == status["step"] == reached, "no step is lost"
    if moment == "a validation":
        assert not figures(run, "eval/mean"), "it was not waited for"


@pytest.mark.slow
def test_a_run_stopped_in_a_validation_goes_on_as_if_it_had_not_been(start, config, tmp_path):
    changes = ("train.eval_every=6", "eval.batch_size=1", "eval.samples_per_task=0", "model.dropout=0.1")
    changes += ("eval.num_beams=4",)  # slow enough to be met
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert start(training(config, whole, *changes)).wait(240) == 0
    child = start(training(config, stopped, *changes))
    wait_for(lambda: MOMENTS["a validation"](stopped), child)
    os.kill(process_of(stopped, 1), signal.SIGUSR1)
    assert child.wait(60) == 75 and latest(stopped) == 6
    assert start([*training(config, stopped, *changes), "--resume"]).wait(240) == 0
    assert (stopped / "DONE").exists() and outcome.read_status(stopped)["state"] == "finished"
    for name in ("train/loss", "train/gradient_norm", "eval/mean"):
        assert figures(stopped, name) == figures(whole, name)
    assert all(torch.equal(tensor, final_weights(stopped)[name]) for name, tensor in final_weights(whole).items())
    scores = [json.loads((run / "best" / "score.json").read_text()) for run in (whole, stopped)]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_in_any_stage_and_precision(run_python, tmp_path):
    files = []
    for stage in range(4):
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        for name, settings in PRECISIONS.items():
            if stage == 0 and name == "fp16":
                continue
            if stage == 0 and name == "bf16":  # all that DeepSpeed has there
                settings = {**settings, "data_types": {"grad_accum_dtype": "bf16"}}
            files.append(tmp_path / f"zero{stage}_{name}.json")
            files[-1].write_text(json.dumps({"zero_optimization": zero, **settings}))
        if stage >= 2:
            offload = {"zero_optimization": {**zero, "offload_optimizer": {"device": "cpu"}}}
            files.append(tmp_path / f"zero{stage}_offload.json")
            files[-1].write_text(json.dumps({**offload, "zero_force_ds_cpu_optimizer": False}))
    done = run_python(*deepspeed("tests/two_ranks_skip.py", *files))
    held = re.findall(r"held: (\S+)", done.stdout)
    assert done.returncode == 0 and held == [str(file) for file in files], done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_ranks_with_disjoint_tasks_and_text_beside_vision_make_the_gradient_of_one_process(
    run_python, config, tmp_path
):
    save(config, tmp_path / "config.json")
    done = run_python(*deepspeed("tests/two_ranks_tasks.py", tmp_path / "config.json", tmp_path))
    assert done.returncode == 0 and "held" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_a_spoilt_image_costs_its_steps_and_nothing_else(train_many, config, tmp_path):
    shutil.copytree(Path(config.data.manifest).parent, tmp_path / "data")
    nan = io.BytesIO()
    np.save(nan, np.full((CELLS, CHANNELS), np.nan, np.float16))
    rewrite(tmp_path / "data", "features/features-000000.tar", 2, nan.getvalue())  # the image train-2
    changes = [f"data.manifest={tmp_path / 'data' / 'manifest.json'}", "train.steps=24", "train.eval_every=24"]
    spoilt = config.override(changes)
    runs = {stage: tmp_path / str(stage) for stage in (0, 2, 3)}
    settings = {0: tmp_path / "zero0.json", 2: "ds_configs/zero2_cpu.json", 3: "ds_configs/zero3_cpu.json"}
    settings[0].write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    train_many({str(stage): (spoilt, str(settings[stage]), run) for stage, run in runs.items()})
    lines = [json.loads(line) for line in (runs[2] / "bad_steps.jsonl").read_text().splitlines()]
    skipped = [line["step"] for line in lines]
    assert 0 < len(lines) < 12
    on_image = {f"{task}/train-{key}" for task in ("easy_vqa", "shape_caption") for key in (2, 26)}
    assert all(on_image & set(line["culprits"]) for line in lines)
    assert [line["samples"] for line in lines] == [[8 * step - 8, 8 * step] for step in skipped]
    rates = figures(runs[2], "train/learning_rate")
    for stage, run in runs.items():
        assert (run / "bad_steps.jsonl").read_text() == (runs[2] / "bad_steps.jsonl").read_text()
        assert figures(run, "train/skipped_steps")[24] == len(lines) and latest(run) == 24
        assert set(range(1, 25)) - set(skipped) == set(figures(run, "train/gradient_norm"))
        assert figures(run, "train/loss") == pytest.approx(figures(runs[2], "train/loss"), rel=1e-5), stage
        assert figures(run, "train/learning_rate") == rates
    assert all(rates[step + 1] == rates[step] for step in skipped if step < 24), "the schedule waits"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("ds_config", ["zero2_cpu", "zero3_cpu"])
def test_a_run_that_diverges_goes_back_once_and_then_ends_with_66(start, config, tmp_path, ds_config):
    run = tmp_path / "run"
    changes = ("train.learning_rate=1e30", "train.warmup_steps=0", "train.steps=100", "train.eval_every=100")
    limits = ("train.save_every=1", "train.max_consecutive_skips=3")
    child = start(training(config, run, *changes, *limits, ds_config=ds_config))
    assert child.wait(240) == 66, (tmp_path / "output0").read_text()[-4000:]
    status, rollback = outcome.read_status(run), json.loads((run / "rollback.json").read_text())
    assert (status["state"], status["code"], status["step"]) == ("numerics", 66, 7)
    assert (rollback["from_step"], rollback["samples"]) == (4, [0, 32]) and latest(run) == 4
    assert [line["step"] for line in rollback["bad_steps"]] == [2, 3, 4]
    lines = [json.loads(line) for line in (run / "bad_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 5, 6, 7]
    assert [line["reason"] for line in lines] == ["left out since the run went back"] * 3 + ["not finite"] * 3
    assert (tmp_path / "output0").read_text().count("resuming from") == 1


@pytest.mark.parametrize("unwritten", [1, 2])
def test_a_run_goes_back_to_the_newest_checkpoint_that_could_be_written(run_python, config, tmp_path, unwritten):
    """A file in the place where a checkpoint would be made is an OSError, as a full disk is."""
    run = tmp_path / "run"
    run.mkdir()
    (run / f"step_{unwritten:08d}.partial").touch()
    changes = (
        "train.learning_rate=1e30",
        f"train.warmup_steps={unwritten - 1}",
        "train.steps=20",
        "train.eval_every=20",
    )
    where = ("--ds_config", "ds_configs/zero2_cpu.json", "--run_dir", run, "--resume")
    changes += ("train.save_every=1", "train.max_consecutive_skips=2")
    done = run_python("python", "launch/train.py", "--recipe", "demo", *where, *overrides(config), *changes)
    assert done.returncode == 66, done.stdout[-3000:] + done.stderr[-3000:]
    status = outcome.read_status(run)
    assert (status["state"], status["code"]) == ("numerics", 66)
    assert "a checkpoint could not be written, 1 in a row: FileExistsError" in done.stdout
    if unwritten == 1:
        assert "no checkpoint to go back to" in done.stderr and not (run / "rollback.json").exists()
    else:
        assert "resuming from " + str(run / "step_00000001") in done.stdout and "again after going back" in done.stderr


@pytest.mark.slow
@pytest.mark.long
def test_a_rank_asleep_is_noticed_by_all_and_started_again_until_it_is_clear_that_it_does_not_help(
    start, config, tmp_path
):
    """Rank 1 reads from a command that gives its shard a few times and then nothing more, for ever."""
    run, opened = tmp_path / "run", tmp_path / "opened"
    shard = Path(config.data.manifest).parent / TEXT_TASKS[0] / "train-000000.tar"
    slow = f"if [ $RANK = 1 ] && [ $(date +%N >> {opened}; wc -l < {opened}) -gt 3 ]; then sleep 10000; fi"
    plain = json.dumps({TEXT_TASKS[0]: f"pipe:{slow}; cat {shard}"})
    changes = (f'data.train_tasks=["{TEXT_TASKS[0]}"]', f"data.plain={plain}", "train.steps=100000")
    changes += ("train.save_every=100000", "train.eval_every=100000", "train.step_limit=4", "train.start_limit=30")
    child = start(["python", "launch/supervise.py", "--wait", "1", "--", *training(config, run, *changes)])
    assert child.wait(500) == 70
    output = (tmp_path / "output0").read_text()
    assert output.count("supervise: started") == 3 and "3 cycles without a newer checkpoint" in output
    for rank in range(2):
        assert "Thread" in (run / f"stack_{rank}.txt").read_text()
    assert outcome.read_status(run)["state"] == "hung"
    assert in_session(child.pid) == [] and not any("sleep 10000" in line for line in commands())


def commands() -> list[str]:
    done = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.long
def test_a_supervised_run_hit_at_random_again_and_again_ends_as_the_undisturbed_one(start, config, tmp_path):
    """Fifty blows, from 3 to 30 steps apart: kills and signals, to ranks and to what launched them."""
    draw, run, whole = random.Random(8), tmp_path / "run", tmp_path / "whole"
    changes = ("train.steps=1000", "train.eval_every=100", "train.save_every=10", "model.dropout=0.1")
    assert start(training(config, whole, *changes)).wait(3000) == 0
    supervise = ["python", "launch/supervise.py", "--wait", "0", "--cycles", "10", "--"]
    child, mark = start([*supervise, *training(config, run, *changes)]), 0
    for _ in range(50):
        mark += draw.randint(3, 30)
        wait_for(lambda: said(run, f'"step": {mark},'), child, 600)  # noqa: B023  waited for at once
        rank = process_of(run, draw.randint(0, 1))
        victim = draw.choice([rank, rank, parent(rank), parent(parent(rank))])
        os.kill(victim, signal.SIGKILL if victim != rank else draw.choice(BLOWS))
    assert child.wait(3000) == 0, (tmp_path / "output1").read_text()[-4000:]
    assert 2 < (tmp_path / "output1").read_text().count("supervise: started") <= 51
    for name in ("train/loss", "train/gradient_norm", "eval/mean"):
        assert figures(run, name) == figures(whole, name)
    assert all(torch.equal(tensor, final_weights(run)[name]) for name, tensor in final_weights(whole).items())


BLOWS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
def test_a_supervised_run_killed_in_a_step_ends_as_the_undisturbed_one(start, config, finished_run, tmp_path):
    run = tmp_path / "run"
    command = ["python", "launch/supervise.py", "--wait", "1", "--", *training(config, run, "model.dropout=0.1")]
    child = start(command)
    wait_for(lambda: said(run, '"step": 4,'), child)
    os.kill(process_of(run, 1), signal.SIGKILL)
    assert child.wait(500) == 0, (tmp_path / "output0").read_text()[-4000:]
    assert (tmp_path / "output0").read_text().count("supervise: started") == 2
    assert all(torch.equal(tensor, final_weights(run)[name]) for name, tensor in final_weights(finished_run(2)).items())
    shutil.rmtree(run)
