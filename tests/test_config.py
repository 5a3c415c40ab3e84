"""Every way to get a configuration wrong says which field, what was given and what is allowed."""

from __future__ import annotations

import pytest

from hyperpelt_ds import config
from hyperpelt_ds.config import Config


def test_json_round_trip_keeps_everything(tmp_path):
    changed = Config().override(
        ["train.steps=5", "data.tasks=a,b", "model.dropout=0.1", 'data.task_weights={"a":2,"b":1}', "eval.num_beams=4"]
    )
    assert changed.data.tasks == ("a", "b") and changed.data.task_weights == {"a": 2.0, "b": 1.0}
    config.save(changed, tmp_path / "config.json")
    assert config.load(tmp_path / "config.json") == changed


def test_overrides_read_json_and_plain_words():
    changed = Config().override(["model.dropout=null", "model.activation_checkpointing=True", "model.backbone=a/b"])
    assert changed.model.dropout is None
    assert changed.model.activation_checkpointing is True
    assert changed.model.backbone == "a/b"


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("train.stepz=1", "unknown key of train: 'stepz'; did you mean steps"),
        ("trian.steps=1", "unknown section: 'trian'; did you mean train"),
        ("train.steps", "expected section.key=value"),
        ("steps=3", "expected section.key=value"),
        ("train.steps=abc", r"train.steps: expected int, got 'abc' \(str\)"),
        ("train.steps=1.5", r"train.steps: expected int, got 1.5 \(float\)"),
        ("train.steps=true", r"train.steps: expected int, got True \(bool\)"),
        ("train.learning_rate=fast", "train.learning_rate: expected float"),
        ("train.steps=0", "train.steps: must be greater than 0, got 0"),
        ("train.seed=-1", "train.seed: must not be negative, got -1"),
        ("train.label_smoothing=1", r"train.label_smoothing: must lie in \[0, 1\)"),
        ("model.dtype=fp8", "model.dtype: got 'fp8', allowed are 'float32', 'bfloat16', 'float16'"),
        ("modules.kinds=prefix,lorra", "modules.kinds: got 'lorra', allowed are 'prefix', 'adapter', 'lora'"),
        ("modules.kinds=[]", "modules.kinds: must name at least one"),
        ("data.tasks=3", "data.tasks: expected a list, got 3"),
        ("data.tasks=a,a", "data.tasks: a task is named twice"),
        ('data.task_weights={"a":0}', "data.task_weights: must be greater than 0"),
        ("data.task_weights=[1]", "data.task_weights: expected a table"),
    ],
)
def test_a_bad_override_names_the_field_and_what_is_allowed(assignment, message):
    with pytest.raises(ValueError, match=message):
        Config().override([assignment])


def test_shared_visual_embeddings_need_as_many_prefix_rows_as_cells():
    with pytest.raises(ValueError, match="got 8 and 49; use 'own'"):
        Config().override(["vision.encoder=resnet18", "hypernet.visual_embeddings=shared", "modules.prefix_length=8"])


def test_a_file_with_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="unknown key of model: 'backbon'; did you mean backbone"):
        config.from_dict({"model": {"backbon": "x"}})
    with pytest.raises(ValueError, match="model: expected a table"):
        config.from_dict({"model": 3})
