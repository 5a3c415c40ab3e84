"""Whole trainings on two real ranks under the DeepSpeed launcher, and on one without it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import overrides
from damage import damage
from safetensors.torch import load_file

from hyperpelt_ds import model as models
from hyperpelt_ds.config import Config, save
from hyperpelt_ds.data.loader import TrainStream
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.train import engine

STAGES = (2, 3)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def figures(run_dir: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in lines(run_dir) if name in line}


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / (run_dir / "LATEST").read_text().strip() / "weights.safetensors")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative distance of a tensor; adapters' up parts start at 0, hence the small constant."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).detach().norm() / (b[name].detach().norm() + 1e-3)) for name in a)


@dataclass(frozen=True)
class Alone:
    """What one plain process left behind: two runs without dropout, and the backbone's fingerprint after training."""

    run: Path
    impatient: Path
    fingerprint: str


@pytest.fixture(scope="module")
def alone(config: Config, run_python: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Alone:
    folder = tmp_path_factory.mktemp("alone")
    # a vanishing rate: no validation is ever better than the first
    impatient = ["train.learning_rate=1e-12", "train.steps=60", "train.patience=2", "train.eval_every=2"]
    save(config, folder / "tiny.json")
    save(config.override(impatient), folder / "impatient.json")
    (folder / "train.py").write_text(
        "from hyperpelt_ds import config, dist\n"
        "from hyperpelt_ds.train import loop\n"
        "for name in ('tiny', 'impatient'):\n"
        f"    folder = {str(folder)!r}\n"
        "    settings = config.load(f'{folder}/{name}.json')\n"
        "    model = loop.train(settings, 'ds_configs/zero2_cpu.json', f'{folder}/{name}')\n"
        "    print('fingerprint', model.backbone.fingerprint())\n"
        "dist.leave()\n"
    )
    done = run_python("python", folder / "train.py")
    assert done.returncode == 0, done.stderr[-4000:]
    return Alone(folder / "tiny", folder / "impatient", done.stdout.split()[-1])


def test_zero_2_and_3_take_the_same_path_on_two_ranks(finished_run):
    two, three = (finished_run(stage) for stage in STAGES)
    assert figures(two, "train/loss") == pytest.approx(figures(three, "train/loss"), rel=1e-6)
    assert figures(two, "train/gradient_norm") == pytest.approx(figures(three, "train/gradient_norm"), rel=1e-5)
    assert distance(final_weights(two), final_weights(three)) < 1e-5
    assert figures(two, "eval/mean").keys() == figures(three, "eval/mean").keys() == {3, 6, 9}


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    finished_run, train_on_two_ranks, with_dropout, tmp_path, stage
):
    whole, resumed = finished_run(stage), tmp_path / "run"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "step_00000009")
    train_on_two_ranks(with_dropout, stage, resumed, "--resume")
    losses = figures(whole, "train/loss")
    assert figures(resumed, "train/loss") == losses and list(losses) == list(range(1, 10))
    assert figures(resumed, "train/gradient_norm") == figures(whole, "train/gradient_norm")
    for name, tensor in final_weights(whole).items():
        assert torch.equal(tensor, final_weights(resumed)[name]), name
    states = [json.loads((run / "step_00000009" / "state.json").read_text())["progress"] for run in (whole, resumed)]
    assert all(state.pop("seconds") > 0 for state in states)
    assert states[0] == states[1]


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(alone, train_on_two_ranks, config, tmp_path):
    train_on_two_ranks(config, 2, tmp_path / "run")
    one, two = figures(alone.run, "train/loss"), figures(tmp_path / "run", "train/loss")
    assert two == pytest.approx(one, rel=1e-5)
    assert distance(final_weights(tmp_path / "run"), final_weights(alone.run)) < 1e-5


@pytest.mark.slow
def test_a_run_of_two_ranks_at_stage_2_goes_on_in_one_process_at_stage_3(
    alone, train_on_two_ranks, run_python, config, tmp_path
):
    run_dir = tmp_path / "run"
    train_on_two_ranks(config, 2, run_dir)
    shutil.rmtree(run_dir / "step_00000009")
    command = ("launch/train.py", "--recipe", "demo", "--ds_config", "ds_configs/zero3_cpu.json", "--resume")
    done = run_python("python", *command, "--run_dir", run_dir, *overrides(config))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "saved with processes 2, this run has 1" in done.stdout + done.stderr
    assert "saved with ZeRO stage 2, this run has 3" in done.stdout + done.stderr
    assert figures(run_dir, "train/loss") == pytest.approx(figures(alone.run, "train/loss"), rel=1e-5)
    assert distance(final_weights(run_dir), final_weights(alone.run)) < 1e-5


def test_the_engine_trains_as_plain_torch_does(alone, config):
    check_against_plain_torch(alone.run, config)


def test_damaged_samples_task_weights_and_a_token_limit_on_two_ranks_train_as_plain_torch_does(
    train_on_two_ranks, config, tmp_path
):
    """What cannot be used weighs nothing anywhere: the mean is over the usable samples of the whole global batch."""
    folder = Path(config.data.manifest).parent
    shutil.copytree(folder, tmp_path / "data")
    damage(tmp_path / "data", "movie_rating/train-000001.tar", "flipped data byte", 5)
    damage(tmp_path / "data", "features/features-000000.tar", "header zeroed", 3)
    manifest = tmp_path / "data" / "manifest.json"
    settings = config.override([f"data.manifest={manifest}", 'data.loss_weights={"easy_vqa": 0.5}', "data.workers=1"])
    limited = settings.override(["train.micro_tokens=60"])
    train_on_two_ranks(limited, 2, tmp_path / "run")
    holes = [json.loads(line) for file in (tmp_path / "run/holes").iterdir() for line in file.read_text().splitlines()]
    assert len({hole["position"] for hole in holes}) == len(holes) == figures(tmp_path / "run", "data/holes")[9]
    on_image = {(task, key) for task in ("easy_vqa", "shape_caption") for key in ("train-3", "train-27")}
    assert {("movie_rating", "train-25")} < {(hole["task"], hole["key"]) for hole in holes} <= {
        ("movie_rating", "train-25"), *on_image
    }  # fmt: skip
    check_against_plain_torch(tmp_path / "run", settings)


def check_against_plain_torch(run: Path, config: Config) -> None:
    """The reference accumulates nothing: one backward pass a step over the sum of the micro-batches' losses."""
    manifest = Manifest.load(config.data.manifest)
    tasks = tuple(manifest.tasks)
    model = models.build(config, tasks).train()
    optimizer = torch.optim.AdamW(
        engine.parameter_groups(model, config.train.weight_decay), lr=config.train.learning_rate
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, engine.learning_rate_factor(config.train))
    stream = TrainStream(manifest, config, tasks, model.backbone.tokenizer, 0, 1)
    losses, norms = {}, {}
    for step, micro_batches in zip(range(1, config.train.steps + 1), stream, strict=False):
        outputs = [model(batch) for batch in micro_batches]
        weights = torch.cat([batch.loss_weights for batch in micro_batches])
        optimizer.zero_grad()
        (sum(output.loss for output in outputs) / (weights > 0).sum()).backward()
        norms[step] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.gradient_clipping))
        optimizer.step()
        schedule.step()
        stream.commit()
        losses[step] = float(torch.cat([output.sample_losses for output in outputs])[weights > 0].mean())
    assert figures(run, "train/loss") == pytest.approx(losses, rel=1e-5)
    assert figures(run, "train/gradient_norm") == pytest.approx(norms, rel=1e-4)
    assert min(losses.values()) < 0.9 * losses[1], "nothing was learned, so nothing was compared"
    assert distance(final_weights(run), dict(model.named_parameters())) < 1e-5


def test_the_frozen_backbone_is_unchanged_after_training(alone, config):
    assert alone.fingerprint == models.build(config, ["movie_rating"]).backbone.fingerprint()
    state = json.loads((alone.run / "step_00000009" / "state.json").read_text())
    assert state["backbone"] == alone.fingerprint


def test_every_documented_figure_is_reported_for_every_task(finished_run, config):
    first = lines(finished_run(2))[0]
    tasks = list(Manifest.load(config.data.manifest).tasks)
    assert {
        "train/loss", "train/learning_rate", "train/gradient_norm", "perf/samples_per_second", "perf/tokens_per_second",
        "perf/memory_gib", "perf/sent_mib_by_formula", "data/padding_share", "data/holes", "data/wait_fraction",
    } <= first.keys()  # fmt: skip
    assert {f"train/{task}/loss" for task in tasks} <= {name for line in lines(finished_run(2)) for name in line}
    validation = next(line for line in lines(finished_run(2)) if "eval/mean" in line)
    assert {f"eval/{task}/exact_match" for task in tasks} <= validation.keys()


def test_the_best_checkpoint_is_the_one_with_the_best_mean_over_tasks(finished_run):
    run_dir = finished_run(2)
    means = figures(run_dir, "eval/mean")
    score = json.loads((run_dir / "best" / "score.json").read_text())
    assert score["score"] == max(means.values()) == means[score["step"]]
    assert score["step"] == min(step for step, mean in means.items() if mean == score["score"]), "the first of equals"


def test_training_stops_when_patience_is_spent_and_keeps_that_step(alone):
    assert max(figures(alone.impatient, "train/loss")) == 6
    assert (alone.impatient / "LATEST").read_text().strip() == "step_00000006"
