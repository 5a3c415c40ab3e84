"""What whole runs leave behind for those who watch them: the same at every stage, and where DeepSpeed is told to."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import IMAGE_TASKS, TEXT_TASKS
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hyperpelt_ds.config import to_dict

TASKS = [*TEXT_TASKS, *IMAGE_TASKS]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(config, run_python, tmp_path_factory) -> Path:
    """Two runs of three steps in one process, at ZeRO 2 (with DeepSpeed's CSV) and 3, in folders named by the stage."""
    folder = tmp_path_factory.mktemp("watched")
    short = config.override(["train.steps=3"])
    jobs = []
    for stage in (2, 3):
        monitor = {"csv_monitor": {"enabled": True, "output_path": str(folder / "csv"), "job_name": str(stage)}}
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # small parameters are taken away as well
        (folder / f"{stage}.json").write_text(json.dumps({"zero_optimization": zero, **monitor}))
        jobs.append({"config": to_dict(short), "ds_config": f"{folder}/{stage}.json", "run_dir": f"{folder}/{stage}"})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = run_python("python", "tests/train_many.py", folder / "jobs.json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def test_a_look_finds_the_same_at_zero_2_and_3(alone):
    check_same(alone / "2", alone / "3", 3)


@pytest.mark.slow
def test_a_look_at_zero_2_and_3_finds_the_same_on_two_ranks(finished_run):
    check_same(finished_run(2), finished_run(3), 9)


@pytest.mark.slow
def test_two_ranks_report_the_bytes_that_each_sends(finished_run):
    """Gradients twice around and weights once, each micro-batch's gradients by themselves: docs/scaling.md."""
    run = finished_run(2)
    rows = [row for row in lines(run / "metrics.jsonl") if "perf/sent_mib_by_formula" in row]
    trainable = sum(parameter.numel() for parameter in load_file(run / "best" / "weights.safetensors").values())
    assert [row["step"] for row in rows] == list(range(1, 10))
    messages = 2 * 400 * 3
    for row in rows:
        assert row["perf/sent_mib_by_formula"] * 2**20 == (2 * 2 * 4 + 4) * trainable / 2 + messages


def check_same(first: Path, second: Path, steps: int) -> None:
    two, three = (lines(run / "observations.jsonl") for run in (first, second))
    assert [line["step"] for line in two] == list(range(1, steps + 1))
    for one, other in zip(two, three, strict=True):
        assert one.keys() == other.keys() and set(one["tasks"]) == set(TASKS)
        assert sum(one["mixture"]["drawn"]) == pytest.approx(1)
        for part in ("gradients", "weights", "hyper_embeddings", "prefix_share"):
            assert flat(one[part]) == pytest.approx(flat(other[part]), rel=1e-3, abs=1e-4)


def flat(values: Any) -> list[float]:
    """All numbers, -9 for one that does not exist."""
    if isinstance(values, dict | list):
        inner = values.values() if isinstance(values, dict) else values
        return [number for value in inner for number in flat(value)]
    return [-9.0 if values is None else values]


def test_a_run_shows_figures_and_answers_at_its_validations(alone):
    run = alone / "2"
    board = EventAccumulator(str(run / "tensorboard"), {"tensors": 0, "images": 0}).Reload()
    steps = [event.step for event in board.Images("gradients/cosine_adapter")]
    assert steps == [3] == [event.step for event in board.Histograms("hyper_embeddings/task")]
    answers = lines(run / "samples.jsonl")
    assert {(line["step"], line["task"]) for line in answers} == {(step, task) for step in steps for task in TASKS}
    assert all((line["image"] is not None) == (line["task"] in IMAGE_TASKS) for line in answers)
    assert all(line["picture"] is None for line in answers), "this data has features and no pictures"
    scalars = {name for line in lines(run / "metrics.jsonl") for name in line} - {"step", "time"}
    assert scalars == set(board.Tags()["scalars"])
    last = [line for line in lines(run / "metrics.jsonl") if "gradient_norm/norms" in line][-1]
    squares = [value**2 for name, value in last.items() if name.startswith("gradient_norm/")]
    assert sum(squares) ** 0.5 == pytest.approx(last["train/gradient_norm"], rel=1e-4)


def test_the_scalars_go_where_the_deepspeed_json_says_as_well(alone):
    expected = {
        (name.replace("/", "_"), row["step"]): value
        for row in lines(alone / "2" / "metrics.jsonl")
        for name, value in row.items()
        if name not in ("step", "time")
    }
    found = {}
    for file in (alone / "csv" / "2").glob("*.csv"):
        header, *written = csv.reader(file.read_text().splitlines())
        assert header[0] == "step"
        found |= {(file.stem, int(step)): float(value) for step, value in written}
    assert found == pytest.approx(expected) and ("gradient_cosine_adapter", 2) in found
