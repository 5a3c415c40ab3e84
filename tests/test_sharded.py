"""Frozen models that are split over real ranks: the same results to the last bit, with a part of the bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import free_port
from test_train import figures, final_weights
from tiny import tiny_backbone

from hyperpelt_ds import counts, recipes
from hyperpelt_ds import model as models
from hyperpelt_ds.config import Config, to_dict
from hyperpelt_ds.train import deepspeed_json


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_split_models_take_the_same_steps_give_the_same_answers_and_hold_a_share_and_a_block(run_python, ranks):
    done = run_python("torchrun", "--nproc_per_node", ranks, "--master_port", free_port(), "tests/ranks_shard.py")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("held ") >= 6


def trained(run_python: Callable[..., Any], ranks: int, folder: Path, jobs: list[dict[str, Any]]) -> None:
    file = folder / f"jobs{len(list(folder.glob('*.json')))}.json"
    file.write_text(
        json.dumps([{**job, "config": to_dict(job["config"]), "run_dir": str(job["run_dir"])} for job in jobs])
    )
    done = run_python(
        *("deepspeed", "--master_port", free_port(), "--num_accelerators", ranks, "tests/train_many.py", file),
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def assert_same(one: Path, other: Path) -> None:
    for name in ("train/loss", "train/gradient_norm", "eval/mean"):
        assert figures(one, name) == figures(other, name) and figures(one, name), name
    ends = final_weights(one), final_weights(other)
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(2, 2), pytest.param(4, 3, marks=pytest.mark.long)])
def test_a_split_run_is_the_whole_one_and_either_goes_on_as_the_other(run_python, with_dropout, tmp_path, ranks, stage):
    ds_config = f"ds_configs/zero{stage}_cpu.json"
    split = with_dropout.override(["model.shard_backbone=true"])

    def job(config: Config, name: str, resume: bool = False) -> dict[str, Any]:
        return {"config": config, "ds_config": ds_config, "run_dir": tmp_path / name, "resume": resume}

    trained(run_python, ranks, tmp_path, [job(with_dropout, "whole"), job(split, "split")])
    assert_same(tmp_path / "whole", tmp_path / "split")
    for there, here in (("whole", "goes_on_split"), ("split", "goes_on_whole")):
        shutil.copytree(tmp_path / there, tmp_path / here)
        shutil.rmtree(tmp_path / here / "step_00000009")
    trained(run_python, ranks, tmp_path, [job(split, "goes_on_split", True), job(with_dropout, "goes_on_whole", True)])
    for name in ("goes_on_split", "goes_on_whole"):
        assert_same(tmp_path / "whole", tmp_path / name)
    plain = models.build(with_dropout, ["movie_rating"]).backbone.fingerprint()
    for name in ("whole", "split", "goes_on_split", "goes_on_whole"):
        assert json.loads((tmp_path / name / "step_00000009" / "state.json").read_text())["backbone"] == plain
    scores = []
    for processes in (1, ranks):
        out = tmp_path / f"scores{processes}.json"
        done = run_python(
            *("deepspeed", "--master_port", free_port(), "--num_accelerators", processes, "launch/evaluate.py"),
            *("--run_dir", tmp_path / "split", "--out", out),
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        scores.append(json.loads(out.read_text())["tasks"])
    assert scores[0] == scores[1]


@pytest.mark.parametrize("kind, groups", [("t5", 5), ("t5v1.1", 5), ("bart", 7), ("llama", 4)])
def test_every_weight_is_in_one_group_and_tied_ones_are_there_once(kind, groups):
    """Two blocks a stack; the embedding, which may be what gives logits too; the positions of two stacks."""
    backbone = tiny_backbone(kind)
    found = backbone.groups
    weights = [weight for group in found for weight in group.weights]
    assert len(found) == groups and {id(w) for w in weights} == {id(p) for p in backbone.model.parameters()}
    assert len(weights) == len(list(backbone.model.parameters()))


def test_a_model_of_the_shape_of_t5_xxl_fits_where_it_is_split():
    found = counts.estimate(recipes.get("glue_t5_base").override(
        ["model.backbone=google/t5-v1_1-xxl", "model.dtype=bfloat16"]
    ))  # fmt: skip
    whole, eight, sixty_four = (found.backbone_bytes[ranks] for ranks in ("1", "8", "64"))
    block = 2 * (8 * 4096 * 4096 + 3 * 4096 * 10240)  # a decoder's: two attentions and a gated feed-forward
    assert whole == pytest.approx(2 * found.backbone_parameters, rel=1e-4)
    for ranks, held in ((8, eight), (64, sixty_four)):
        assert held == pytest.approx(whole / ranks + block, rel=0.01)


@pytest.mark.parametrize(
    "assignment, field",
    [
        ("model.shard_backbone=true", "model.shard_backbone: got True"),
        ("model.quantize=int8", "model.quantize: got 'int8'"),
    ],
)
def test_a_trained_backbone_is_neither_split_nor_quantised(assignment, field):
    with pytest.raises(ValueError, match=f"{field}, but model.train_backbone"):
        Config().override(["model.train_backbone=true", assignment])


def test_autocast_that_would_keep_a_copy_of_every_weight_is_refused(tmp_path):
    file = tmp_path / "autocast.json"
    file.write_text(json.dumps({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}))
    split = Config().override(["model.shard_backbone=true"])
    with pytest.raises(ValueError, match=r"torch_autocast to 'bfloat16' keeps a copy .* set model.dtype to the same"):
        deepspeed_json.merge(file, split, 1)
    deepspeed_json.merge(file, split.override(["model.dtype=bfloat16"]), 1)
    deepspeed_json.merge(file, Config(), 1)


def test_alone_nothing_is_split(config):
    backbone = models.build(config.override(["model.shard_backbone=true"]), ["movie_rating"]).backbone
    assert backbone.shards is None
    assert backbone.fingerprint() == models.build(config, ["movie_rating"]).backbone.fingerprint()
