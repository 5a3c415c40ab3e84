"""What a checkpoint holds, which one is trusted, which run may continue it, and what a process killed in it leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hyperpelt_ds import model as models
from hyperpelt_ds.config import load as load_config
from hyperpelt_ds.train import checkpoint
from hyperpelt_ds.train.partitions import Snapshot


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


def test_the_manifest_lists_every_file_and_all_are_ours(finished_run):
    folder = finished_run(2) / "step_00000009"
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    names = {"weights.safetensors", "moments.safetensors", "random.json", "state.json"}
    assert {path.name for path in folder.iterdir()} == {*names, "MANIFEST.json"}
    assert set(manifest["files"]) == names and manifest["format"] == checkpoint.FORMAT and manifest["step"] == 9
    assert len(json.loads((folder / "random.json").read_text())) == 2, "one for each rank"


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_has_12_bytes_a_trainable_and_little_else(finished_run, stage):
    folder = finished_run(stage) / "step_00000009"
    weights, moments = load_file(folder / "weights.safetensors"), load_file(folder / "moments.safetensors")
    assert moments.keys() == {f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq") for name in weights}
    assert {tensor.dtype for tensor in moments.values()} == {torch.float32}
    trainables = sum(tensor.numel() for tensor in weights.values())
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12 * trainables + 2**20


def test_the_newest_valid_checkpoint_is_taken(run_dir):
    assert checkpoint.newest(run_dir) == run_dir / "step_00000009"


def test_a_folder_without_checkpoints_has_none_to_resume(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "absent") is None


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _cut(file: Path, size: int = 1) -> None:
    file.write_bytes(file.read_bytes()[:-size])


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _unreadable(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def _remake(folder: Path, **changes: object) -> None:
    manifest = folder / "MANIFEST.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))


def _older(folder: Path) -> None:
    """As the first version wrote it: DeepSpeed's own files, and a manifest that says no format."""
    (folder / "moments.safetensors").rename(folder / "rank_0.json")
    (folder / "MANIFEST.json").write_text('{"files": {}}')


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (lambda f: _flip(f / "weights.safetensors"), "weights.safetensors has another sha256"),
    "flipped byte in the moments": (lambda f: _flip(f / "moments.safetensors"), "moments.safetensors has another"),
    "cut file": (lambda f: _cut(f / "weights.safetensors"), "weights.safetensors has"),
    "grown file": (lambda f: (f / "random.json").open("a").write(" "), "random.json has"),
    "missing file": (lambda f: (f / "random.json").unlink(), "random.json is missing"),
    "another checkpoint's file": (
        lambda f: shutil.copy(f.with_name("step_00000006") / "moments.safetensors", f),
        "moments.safetensors has another sha256",
    ),
    "unreadable file": (lambda f: _unreadable(f / "state.json"), "state.json is missing"),
    "missing manifest": (lambda f: (f / "MANIFEST.json").unlink(), "MANIFEST.json cannot be read"),
    "cut manifest": (lambda f: _cut(f / "MANIFEST.json", 10), "MANIFEST.json cannot be read"),
    "manifest of another kind": (lambda f: (f / "MANIFEST.json").write_text("[1]"), "MANIFEST.json cannot be read"),
    "unreadable manifest": (lambda f: _unreadable(f / "MANIFEST.json"), "MANIFEST.json cannot be read"),
    "manifest of nothing": (lambda f: _remake(f, files={}), "MANIFEST.json does not list weights.safetensors"),
    "manifest without hashes": (lambda f: _remake(f, files={n: {} for n in FILES}), "MANIFEST.json cannot be read"),
    "empty folder": (_empty, "MANIFEST.json cannot be read"),
    "older format": (_older, "it has format 1, this version reads format 2"),
    "newer format": (lambda f: _remake(f, format=3), "it has format 3, this version reads format 2"),
    "another step's": (
        lambda f: (shutil.rmtree(f), shutil.copytree(f.with_name("step_00000006"), f)),
        "MANIFEST.json is of step 6",
    ),
}
FILES = ("weights.safetensors", "moments.safetensors", "random.json", "state.json")


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_rejected_with_its_reason_and_the_one_before_is_taken(run_dir, caplog, how):
    damage, reason = DAMAGE[how]
    damage(run_dir / "step_00000009")
    assert checkpoint.newest(run_dir) == run_dir / "step_00000006"
    assert "step_00000009 rejected: " + reason in caplog.text


def test_what_latest_names_does_not_matter(run_dir):
    for text in ("step_00000006\n", "step_00000012\n", ""):
        (run_dir / "LATEST").write_text(text)
        assert checkpoint.newest(run_dir) == run_dir / "step_00000009"


def test_a_folder_that_was_being_written_is_not_a_checkpoint(run_dir):
    (run_dir / "step_00000009").rename(run_dir / "step_00000012.partial")
    assert checkpoint.newest(run_dir) == run_dir / "step_00000006"


def test_no_valid_checkpoint_among_some_is_an_error_and_not_a_new_start(run_dir):
    for name in ("step_00000006", "step_00000009"):
        _cut(run_dir / name / "weights.safetensors")
    with pytest.raises(ValueError, match=r"no valid checkpoint.*step_00000009.*step_00000006"):
        checkpoint.newest(run_dir)


def test_the_newest_stay_and_so_does_every_so_manieth_step(tmp_path):
    nothing = Snapshot({}, {}, {})
    for step in range(2, 17, 2):
        checkpoint._commit(tmp_path / checkpoint._name(step), nothing, [], {"progress": {"step": step}}, (2, 5))
    assert [checkpoint._step(folder) for folder in checkpoint._folders(tmp_path)] == [16, 14, 10]
    checkpoint._commit(tmp_path / checkpoint._name(18), nothing, [], {"progress": {"step": 18}}, (1, 0))
    assert [checkpoint._step(folder) for folder in checkpoint._folders(tmp_path)] == [18]


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


@pytest.mark.parametrize("change, message", [({"world_size": 4}, "saved with processes 2, this run has 4"),
                                             ({"zero_stage": 3}, "saved with ZeRO stage 2, this run has 3"),
                                             ({"precision": {"bf16": {}}}, "saved with precision")])  # fmt: skip
def test_another_world_size_stage_or_precision_is_said(saved, caplog, change, message):
    folder, run = saved
    with caplog.at_level("INFO"):
        checkpoint.check(folder, **run)
        assert not caplog.messages
        checkpoint.check(folder, **{**run, **change})
    assert [message in text for text in caplog.messages] == [True]
