"""What a checkpoint holds, which one is trusted, and which run may continue it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hyperpelt_ds import model as models
from hyperpelt_ds.config import load as load_config
from hyperpelt_ds.train import checkpoint


@pytest.fixture
def run_dir(finished_run, tmp_path) -> Path:
    """A copy of a finished run, to be damaged."""
    return Path(shutil.copytree(finished_run(2), tmp_path / "run"))


def test_only_the_last_checkpoints_are_kept_and_nothing_half_written_remains(finished_run):
    folder = finished_run(2)
    names = {path.name for path in folder.iterdir()}
    assert {name for name in names if name.startswith("step_")} == {"step_00000006", "step_00000009"}
    assert (folder / "LATEST").read_text().strip() == "step_00000009"
    assert not [path for path in folder.rglob("*") if path.suffix in (".partial", ".old")]


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_are_the_trainables_in_full_fp32_and_nothing_of_the_backbone(finished_run, stage):
    run = finished_run(stage)
    config = load_config(run / "config.json")
    expected = dict(models.build(config, config.data.tasks).named_parameters())
    saved = load_file(run / "step_00000009" / "weights.safetensors")
    assert {name: tensor.shape for name, tensor in saved.items()} == {n: p.shape for n, p in expected.items()}
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert any(not torch.equal(saved[name], parameter) for name, parameter in expected.items())


def test_a_finished_run_loads_with_its_best_weights(finished_run):
    run = finished_run(2)
    predictor = models.load(run)
    for name, tensor in load_file(run / "best" / "weights.safetensors").items():
        assert torch.equal(predictor.model.state_dict()[name], tensor)


def test_the_manifest_lists_every_file(finished_run):
    folder = finished_run(2) / "step_00000009"
    listed = json.loads((folder / "MANIFEST.json").read_text())["files"]
    assert set(listed) == {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} - {"MANIFEST.json"}
    assert {"weights.safetensors", "state.json", "rank_0.json", "rank_1.json"} <= set(listed)


def test_the_newest_valid_checkpoint_is_taken(run_dir):
    assert checkpoint.newest(run_dir) == run_dir / "step_00000009"


def test_a_folder_without_checkpoints_has_none_to_resume(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "absent") is None


def damage(folder: Path, how: str) -> None:
    weights, manifest = folder / "weights.safetensors", folder / "MANIFEST.json"
    if how == "flipped byte":
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif how == "cut file":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "missing file":
        (folder / "rank_1.json").unlink()
    elif how == "missing manifest":
        manifest.unlink()
    elif how == "cut manifest":
        manifest.write_bytes(manifest.read_bytes()[:-10])
    elif how == "manifest of nothing":
        manifest.write_text('{"files": {}}')
    elif how == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.mark.parametrize(
    "how, reason",
    [
        ("flipped byte", "weights.safetensors has another sha256"),
        ("cut file", "weights.safetensors has"),
        ("missing file", "rank_1.json is missing"),
        ("missing manifest", "MANIFEST.json cannot be read"),
        ("cut manifest", "MANIFEST.json cannot be read"),
        ("manifest of nothing", "MANIFEST.json does not list weights.safetensors"),
        ("empty folder", "MANIFEST.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_rejected_with_its_reason_and_the_one_before_is_taken(run_dir, caplog, how, reason):
    damage(run_dir / "step_00000009", how)
    assert checkpoint.newest(run_dir) == run_dir / "step_00000006"
    assert "step_00000009 rejected: " + reason in caplog.text


def test_a_folder_that_was_being_written_is_not_a_checkpoint(run_dir):
    (run_dir / "step_00000009").rename(run_dir / "step_00000012.partial")
    assert checkpoint.newest(run_dir) == run_dir / "step_00000006"


def test_no_valid_checkpoint_among_some_is_an_error_and_not_a_new_start(run_dir):
    for name in ("step_00000006", "step_00000009"):
        damage(run_dir / name, "cut file")
    with pytest.raises(ValueError, match=r"no valid checkpoint.*step_00000009.*step_00000006"):
        checkpoint.newest(run_dir)


@pytest.fixture
def saved(finished_run) -> tuple[Path, dict]:
    """A checkpoint, and the arguments under which it can be continued."""
    folder = finished_run(2) / "step_00000009"
    state = json.loads((folder / "state.json").read_text())
    same = {"backbone": state["backbone"], "precision": state["precision"]}
    config = load_config(finished_run(2) / "config.json")
    return folder, {"config": config, **same, "world_size": 2, "zero_stage": 2}


def test_the_same_run_may_go_on_with_another_cadence_and_micro_batch(saved):
    folder, run = saved
    checkpoint.check(folder, **run)
    longer = run["config"].override(
        ["train.keep_checkpoints=5", "train.micro_batch=1", "train.patience=3", "eval.num_beams=4"]
    )
    checkpoint.check(folder, **{**run, "config": longer})


def test_another_backbone_is_refused(saved):
    folder, run = saved
    with pytest.raises(ValueError, match="fingerprint"):
        checkpoint.check(folder, **{**run, "backbone": "0" * 64})


def test_another_task_list_is_refused_and_both_are_shown(saved):
    folder, run = saved
    turned = run["config"].override(["data.tasks=movie_rating,movie_sentiment,easy_vqa,shape_caption"])
    with pytest.raises(ValueError) as error:
        checkpoint.check(folder, **{**run, "config": turned})
    assert "['movie_sentiment', 'movie_rating', 'easy_vqa', 'shape_caption']" in str(error.value)
    assert "['movie_rating', 'movie_sentiment', 'easy_vqa', 'shape_caption']" in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        "train.learning_rate=0.5",
        "train.steps=50",
        "train.seed=1",
        "modules.bottleneck=5",
        "data.temperature=1.0",
        "model.dropout=0.2",
    ],
)
def test_a_change_that_makes_it_another_run_is_refused_and_named(saved, change):
    folder, run = saved
    with pytest.raises(ValueError, match=change.partition("=")[0]):
        checkpoint.check(folder, **{**run, "config": run["config"].override([change])})


@pytest.mark.parametrize("change, message", [({"world_size": 4}, "processes 2, this run has 4"),
                                             ({"zero_stage": 3}, "ZeRO stage 2, this run has 3"),
                                             ({"precision": {"bf16": {}}}, "saved with precision")])  # fmt: skip
def test_another_world_size_or_stage_is_refused(saved, change, message):
    folder, run = saved
    with pytest.raises(ValueError, match=message):
        checkpoint.check(folder, **{**run, **change})
