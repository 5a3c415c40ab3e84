"""kill -9 while training and at every change that a checkpoint makes to the disk: the run goes on as if undisturbed."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import free_port
from safetensors.torch import load_file

from hyperpelt_ds.config import Config, save
from hyperpelt_ds.train import checkpoint

Train = Callable[..., int]
NOWHERE = "nowhere"


@pytest.fixture(scope="module")
def train(run_python: Callable[..., Any], with_dropout: Config, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Starts killed_training.py; its return code."""
    changes = ["train.steps=40", "train.save_every=2", "train.eval_every=40", "train.keep_checkpoints=1"]
    file = tmp_path_factory.mktemp("config") / "config.json"
    save(with_dropout.override(changes), file)

    def train(ranks: int, stage: int, run_dir: Path, where: str) -> int:
        launcher = ["deepspeed", "--master_port", free_port(), "--num_accelerators", ranks] if ranks > 1 else ["python"]
        job = (file, f"ds_configs/zero{stage}_cpu.json", run_dir, where)
        done = run_python(*launcher, "tests/killed_training.py", *job)
        assert done.returncode == 0 or where != NOWHERE, done.stdout[-4000:] + done.stderr[-4000:]
        return int(done.returncode)

    return train


def losses(run_dir: Path) -> dict[int, float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def assert_same(run_dir: Path, undisturbed: Path) -> None:
    assert losses(run_dir) == losses(undisturbed) and len(losses(run_dir)) == 40
    for name in ("weights.safetensors", "moments.safetensors"):
        one, other = (load_file(folder / "step_00000040" / name) for folder in (run_dir, undisturbed))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert {path.name for path in run_dir.glob("step_*")} == {"step_00000040"}
    assert not [path for path in run_dir.rglob("*") if path.suffix in (".partial", ".trash")]


# A commit: the folder, four files, the manifest, the folder's names, the rename, the run's names, LATEST (flushed,
# replaced, the run's names); then the older one: renamed, a file unlinked, ..., its folder.
POINTS = [f"commit {number}" for number in (*range(1, 15), 18)]


@pytest.mark.slow
def test_a_run_killed_at_every_write_point_and_at_random_is_bitwise_the_undisturbed_one(train, tmp_path):
    train(1, 2, tmp_path / "undisturbed", NOWHERE)
    run_dir, newest = tmp_path / "run", None
    draw = random.Random(0)
    places = [*POINTS, *(f"forward {draw.randint(2, 20)} 0" for _ in range(5))]
    draw.shuffle(places)
    for where in places:
        assert train(1, 2, run_dir, where) == -signal.SIGKILL, where
        before, newest = newest, checkpoint.newest(run_dir)
        assert before is None or (newest is not None and newest >= before)
    train(1, 2, run_dir, NOWHERE)
    assert_same(run_dir, tmp_path / "undisturbed")


@pytest.mark.slow
def test_two_ranks_of_which_one_is_killed_go_on_bitwise(train, tmp_path):
    train(2, 3, tmp_path / "undisturbed", NOWHERE)
    for where in ("forward 5 1", "commit 4", "commit 9", "forward 9 1", "commit 11", "forward 7 0"):
        assert train(2, 3, tmp_path / "run", where) != 0, where
    train(2, 3, tmp_path / "run", NOWHERE)
    assert_same(tmp_path / "run", tmp_path / "undisturbed")
