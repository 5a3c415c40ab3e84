"""An exception that nothing catches, in a run of several ranks: one of them says what happened, once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, free_port, overrides

from hyperpelt_ds.train.crash import CAUSE

RANK = """
import sys, time
from pathlib import Path
from hyperpelt_ds.train import crash
time.sleep(float(sys.argv[3]))
crash.speak_once(Path(sys.argv[1]))
time.sleep(float(sys.argv[2]))
{}
"""
IN_A_COLLECTIVE = (
    "exec(compile('raise RuntimeError(\"connection closed by peer\")', '/x/torch/distributed/y.py', 'exec'))"
)


def rank(
    number: int, folder: Path, body: str, wait: float = 0.0, late: float = 0.0, world_size: int = 2
) -> subprocess.Popen[str]:
    """A process that begins `late` seconds after others and ends, `wait` seconds later, on what `body` raises."""
    environment = {**os.environ, "RANK": str(number), "WORLD_SIZE": str(world_size), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RANK.format(body), str(folder), str(wait), str(late)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def said(*processes: subprocess.Popen[str]) -> list[str]:
    return [process.communicate(timeout=120)[1] for process in processes]


@pytest.mark.parametrize("late", [0.0, 2.0])
def test_ranks_that_fail_by_themselves_speak_once_and_all_leave_their_traces(tmp_path, late):
    """Also where one failed before the other began."""
    words = said(
        rank(0, tmp_path, "raise KeyError('of rank 0')"), rank(1, tmp_path, "raise KeyError('of rank 1')", late=late)
    )
    [spoken] = [text for text in words if text]
    assert spoken.count("Traceback") == 1 and "error: rank" in spoken and "trace_" in spoken.splitlines()[-1]
    for number in range(2):
        assert f"KeyError: 'of rank {number}'" in (tmp_path / f"trace_{number}.txt").read_text()


def test_a_rank_that_lost_its_peer_leaves_the_word_to_it(tmp_path):
    words = said(rank(0, tmp_path, IN_A_COLLECTIVE), rank(1, tmp_path, "raise KeyError('why')", wait=2.0))
    assert words[0] == "" and words[1].count("Traceback") == 1
    assert "error: rank 1" in words[1] and "KeyError: 'why'" in (tmp_path / CAUSE).read_text()


@pytest.mark.slow
def test_a_rank_that_lost_its_peer_speaks_if_nobody_else_does_whatever_an_earlier_start_left(tmp_path):
    (tmp_path / CAUSE).write_text("rank 1: of yesterday\n")
    os.utime(tmp_path / CAUSE, (0, 0))
    [words] = said(rank(0, tmp_path, IN_A_COLLECTIVE))
    assert "connection closed by peer" in words and "another rank is gone and left no word" in words
    assert "yesterday" not in (tmp_path / CAUSE).read_text()


def test_a_process_alone_keeps_pythons_own_way_and_an_interruption_is_a_word(tmp_path):
    alone, first, second = said(
        rank(0, tmp_path, "raise KeyError('x')", world_size=1),
        *(rank(number, tmp_path, "raise KeyboardInterrupt") for number in range(2)),
    )
    assert alone.startswith("Traceback") and not list(tmp_path.iterdir())
    assert (first, second) == ("interrupted\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("broken", [0, 1])
def test_a_rank_that_fails_in_a_training_is_the_only_one_that_is_heard(run_python, config, tmp_path, broken):
    """It cannot write its process's file, since a folder has its name; the other rank goes on, and loses it."""
    run: Callable[..., subprocess.CompletedProcess[str]] = run_python
    folder = tmp_path / "run"
    (folder / "processes" / f"rank_{broken}.json").mkdir(parents=True)
    done = run(
        *("deepspeed", "--quiet", "--master_port", free_port(), "--num_accelerators", 2, "launch/train.py"),
        *("--recipe", "demo", "--ds_config", "ds_configs/zero2_cpu.json", "--run_dir", folder, "--resume"),
        *overrides(config),
        timeout=600,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 1 and output.count("Traceback (most recent call last)") == 1, output
    *_, cause, where = [line for line in done.stderr.splitlines() if line.strip()]
    assert f"error: rank {broken} on " in cause and "IsADirectoryError" in cause
    assert str(folder / f"trace_{broken}.txt") in where
    assert f"rank {broken} on " in (folder / CAUSE).read_text()
