"""train.py --dry_run: what it says is what a training then does, and it leaves nothing."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import free_port, overrides

from hyperpelt_ds.data.batching import cut
from hyperpelt_ds.train import fitting


@pytest.mark.parametrize("budget, expected", [(9, 0), (10, 1), (17, 2), (22, 4), (37, 4), (38, 8), (10**9, 24)])
def test_the_largest_micro_batch_is_a_divisor_on_the_line_through_the_last_two_trials(budget, expected):
    assert fitting.largest({1: 10, 2: 14}, 6, budget, 8 if budget < 10**9 else 24) == expected


def test_one_trial_makes_a_line_with_what_was_held_before_and_a_peak_that_does_not_grow_is_no_falling_line():
    assert fitting.largest({2: 10}, 6, 14, 8) == 4
    assert fitting.largest({2: 12, 4: 10}, 6, 12, 8) == 8 and fitting.largest({2: 12, 4: 11}, 6, 10, 8) == 0


def test_what_fits_is_what_a_step_may_put_together():
    """As data/batching.cut does where a few short samples go alone."""
    for share, samples in ((32, 16), (32, 4), (8, 8), (12, 3)):
        costs = [(5, 2)] * (share // samples - 1) + [(128, 32)] * (share - share // samples + 1)
        assert max(map(len, cut(costs, share // samples))) <= fitting.most(samples, share)
    assert fitting.most(16, 32) == 31 and fitting.most(32, 32) == 32
    assert fitting.largest({1: 10, 2: 20}, 0, 100, 32) == 8
    assert fitting.largest({1: 10, 2: 20}, 0, 100, 32, fitting.most) == 4


def test_a_first_trial_that_runs_out_of_memory_is_an_answer():
    def attempt(samples: int) -> None:
        raise torch.OutOfMemoryError

    assert fitting.largest_micro_batch(attempt, 8, 4).largest == 0


def test_trials_see_the_memory_that_they_take():
    sizes = []

    def attempt(samples: int) -> None:
        sizes.append(samples)
        assert len(b"x" * (samples * 2**26))

    fit = fitting.largest_micro_batch(attempt, 16, 2)
    assert sizes == [2, 4] == list(fit.peaks)
    assert fit.peaks[4] - fit.peaks[2] == pytest.approx(2 * 2**26, rel=0.2)
    assert fit.largest in (1, 2, 4, 8, 16) and fit.peaks[4] < fit.budget


def test_a_dry_run_says_what_there_is_and_leaves_nothing(run_python, config, tmp_path):
    words = ("--recipe", "demo", "--ds_config", "ds_configs/zero2_cpu.json", "--run_dir", str(tmp_path / "run"))
    done = run_python("python", "launch/train.py", *words, "--dry_run", *overrides(config), timeout=600)
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "dry run: nothing was written" and len(lines) < 24
    assert "4 tasks, 192 training samples; 0 of 16 sources cut" in done.stdout
    assert "ZeRO 2, float32, 1 x cpu, 4 micro-batches of 2 a step" in done.stdout
    assert "micro-batch  8 samples of the longest length, 16 + 8 tokens, fit" in done.stdout
    command = next(line for line in lines if line.startswith("next: python launch/train.py"))
    assert "--dry_run" not in command and command.endswith("train.micro_batch=8")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_on_two_ranks_its_steps_are_the_first_ones_of_the_training(run_python, finished_run, with_dropout, tmp_path):
    done = run_python(
        *("deepspeed", "--quiet", "--master_port", free_port(), "--num_accelerators", 2, "launch/train.py"),
        *("--recipe", "demo", "--ds_config", "ds_configs/zero2_cpu.json", "--run_dir", tmp_path / "run"),
        *("--dry_run", *overrides(with_dropout)),
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = [float(text) for text in re.findall(r"(\d+\.\d{4}) in ", done.stdout)]
    trained = [json.loads(line) for line in (finished_run(2) / "metrics.jsonl").open()]
    assert said == pytest.approx([line["train/loss"] for line in trained if "train/loss" in line][:2], abs=1e-4)
    assert done.stdout.count("next: deepspeed --num_accelerators 2 launch/train.py") == 1
    assert not list(tmp_path.iterdir())
