"""What a checkpoint costs the loop, and what happens when the disk is full or a writer fails."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, free_port

COMMON = """
import os, sys, threading
from pathlib import Path

import torch
from safetensors.torch import load_file

import train_states
from hyperpelt_ds import dist
from hyperpelt_ds.train import checkpoint, engine

place, settings = Path(sys.argv[-2]), Path(sys.argv[-1])
engine.start_distributed()
wrapped = train_states.start({"optimizer": "adamw", "dropout": 0.3, "micro_batch": 2, "load": None}, settings)

def saver():
    return checkpoint.Saver(place / "run", train_states.CONFIG, "backbone")

def progress(step, **more):
    return checkpoint.Progress(step, train_states.STREAM, **more)

def left():
    return sorted(path.name for path in (place / "run").iterdir())
"""

WHILE_TRAINING = """
trained, flushed = threading.Event(), os.fsync

def wait_and_flush(descriptor):
    assert trained.wait(120), "training waited for the disk"
    flushed(descriptor)

os.fsync = wait_and_flush
train_states.train(wrapped, 0)
before = wrapped.snapshot()
writing = saver()
writing.save(wrapped, progress(1))
for step in range(1, 4):
    train_states.train(wrapped, step)
assert left() == ["step_00000001.partial"], left()
after = wrapped.weights()
trained.set()
writing.save(wrapped, progress(4))
assert "step_00000001" in left(), "a save waits for the one before"
writing.close()
assert left() == ["LATEST", "step_00000001", "step_00000004"]
files = [load_file(place / "run" / f"step_0000000{step}" / "weights.safetensors") for step in (1, 4)]
for name, tensor in before.weights.items():
    assert torch.equal(files[0][name], tensor) and torch.equal(files[1][name], after[name])
    assert "frozen" in name or not torch.equal(tensor, after[name])
"""

FULL_DISK = """
filler = place / "filler"

def fill():
    if dist.rank() == 0:
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
    dist.barrier()

def free():
    if dist.rank() == 0:
        filler.unlink()
    dist.barrier()

def fails(call, *arguments, kind=OSError):
    try:
        call(*arguments)
    except kind as error:
        return str(error)
    raise AssertionError(f"{call} did not raise on rank {dist.rank()}")

train_states.train(wrapped, 0)
whole = saver()
whole.save(wrapped, progress(1))
assert whole.save_best(wrapped, 1, 0.5, {})
whole.close()
kept = ["LATEST", "best", "step_00000001"]

fill()
failing = saver()
for step in (2, 3, 4):
    train_states.train(wrapped, step)
    failing.save(wrapped, progress(step))
assert not failing.save_best(wrapped, 4, 0.7, {}), "the best stays the old one, and so does its score"
assert "3 checkpoints in a row could not be written: OSError" in fails(failing.save, wrapped, progress(5))
assert left() == kept and checkpoint.newest(place / "run").name == "step_00000001"
assert '"step": 1' in (place / "run/best/score.json").read_text()

failing = saver()
for step in (6, 7):
    failing.save(wrapped, progress(step))
failing.wait()
free()
failing.save(wrapped, progress(8))
failing.save(wrapped, progress(9))  # the count begins anew
failing.close()
assert checkpoint.newest(place / "run").name == "step_00000009"

fill()
failing = saver()
failing.save(wrapped, progress(10))
assert "the last checkpoint could not be written" in fails(failing.close)
free()

failing = saver()
failing.save(wrapped, progress(11, best_score=object()))
assert "object is not JSON serializable" in fails(failing.save, wrapped, progress(12), kind=RuntimeError)
assert checkpoint.newest(place / "run").name == "step_00000009"
torch.distributed.barrier()
"""


@pytest.fixture
def run(run_python: Callable[..., Any], tmp_path: Path) -> Callable[..., None]:
    def run(ranks: int, script: str, place: Path) -> None:
        path = f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        (tmp_path / "script.py").write_text(path + script + "dist.leave()\n")
        settings = {"zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 50_000}}
        (tmp_path / "settings.json").write_text(json.dumps(settings))
        launcher = ["deepspeed", "--master_port", free_port(), "--num_accelerators", ranks] if ranks > 1 else ["python"]
        done = run_python(*launcher, tmp_path / "script.py", place, tmp_path / "settings.json")
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with room for a few checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_training_goes_on_while_a_checkpoint_of_how_it_was_is_written(run, tmp_path):
    run(1, COMMON + WHILE_TRAINING, tmp_path)


@pytest.mark.slow
def test_a_full_disk_costs_checkpoints_but_not_the_run_until_the_third_in_a_row(run, small_disk):
    run(2, COMMON + FULL_DISK, small_disk)
