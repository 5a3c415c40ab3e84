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
        ("train.learning_rate=Infinity", "train.learning_rate: expected a finite number, got inf"),
        ("train.step_limit=NaN", "train.step_limit: expected a finite number, got nan"),
        ('data.loss_weights={"a":NaN}', "data.loss_weights.a: expected a finite number"),
        ("vision.encoder=", "vision.encoder: is empty; null is for none"),
        ("hypernet.copies=true", "hypernet.copies: got True, allowed are"),
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


@pytest.mark.parametrize(
    "assignments, message",
    [
        (
            "modules.kinds=prefix modules.prefix_blocks=[]",
            "modules.prefix_blocks: must name at least one for .*'prefix'",
        ),
        ("modules.kinds=adapter modules.adapter_blocks=[]", "modules.adapter_blocks: must name at least one"),
        ("modules.kinds=lora modules.lora_targets=[]", "modules.lora_targets: must name at least one for .*'lora'"),
        ("modules.prefix_blocks=encoder_ffn", "modules.prefix_blocks: got 'encoder_ffn', allowed are 'encoder_self', "),
        ("modules.adapter_blocks=encoder_ffn,encoder_ffn", "modules.adapter_blocks: one is named twice"),
        ("modules.lora_targets=query,query", "modules.lora_targets: one is named twice in .'query', 'query'."),
        ("modules.lora_targets=wi", "modules.lora_targets: got 'wi', allowed are 'query', .*'gate', 'up', 'down'"),
        ("modules.prefix_weighting=sigmoid", "modules.prefix_weighting: .* allowed are 'none', 'offset', 'gate'"),
        ("modules.adapter_scale_value=0", "modules.adapter_scale_value: must be greater than 0"),
        ("modules.lora_rank=0", "modules.lora_rank: must be greater than 0"),
        ("hypernet.projector_depth=0", "hypernet.projector_depth: must be greater than 0"),
        ("hypernet.prefix_mlp=-1", "hypernet.prefix_mlp: must not be negative"),
        ("hypernet.copies=3", "hypernet.copies: got 3, allowed are 1, 2"),
        ("hypernet.conditions=[]", "hypernet.conditions: nothing makes the weights of modules.kinds; name 'task', "),
        ("hypernet.conditions=image", "nothing makes the weights of modules.kinds"),  # without an image encoder
        ("hypernet.conditions=task,task", "hypernet.conditions: one is named twice"),
        (
            "hypernet.conditions=task,sound",
            "hypernet.conditions: got 'sound', allowed are 'task', 'image', 'description'",
        ),
        ("hypernet.conditions=task,description", "hypernet.sentence_encoder: 'description' in .* needs one"),
        (
            "hypernet.prefix_mlp=8",
            "hypernet.prefix_mlp: needs hypernet.parameters='shared' and 'prefix' in modules.kinds",
        ),
        ("hypernet.parameters=task hypernet.prefix_mlp=8", "hypernet.prefix_mlp: needs hypernet.parameters='shared'"),
        (
            "hypernet.parameters=shared hypernet.prefix_mlp=8 modules.kinds=adapter",
            "hypernet.prefix_mlp: needs .* 'prefix' in modules.kinds",
        ),
        ("vision.tokens=true", "vision.tokens: there are no image features without vision.encoder"),
        (
            "model.train_backbone=true modules.kinds=[] model.dtype=bfloat16",
            "model.dtype: model.train_backbone needs float32 master weights, got bfloat16; let the DeepSpeed JSON",
        ),
    ],
)
def test_modules_and_what_makes_them_must_fit_together(assignments, message):
    with pytest.raises(ValueError, match=message):
        Config().override(assignments.split())


@pytest.mark.parametrize(
    "assignments",
    [
        "modules.kinds=lora modules.prefix_blocks=[] modules.adapter_blocks=[]",
        "hypernet.conditions=image vision.encoder=resnet18",
        "hypernet.conditions=[] hypernet.parameters=task",
        "hypernet.conditions=description hypernet.sentence_encoder=a/b",
        "hypernet.conditions=[] hypernet.parameters=shared hypernet.prefix_mlp=8",
        "model.train_backbone=true modules.kinds=[] hypernet.conditions=[]",
        "model.train_backbone=true modules.kinds=[] vision.encoder=resnet18 vision.tokens=true",
        "vision.encoder=resnet18 hypernet.visual_embeddings=shared",  # 49 prefix rows and 49 cells
        "hypernet.conditions=task vision.encoder=resnet18 hypernet.visual_embeddings=shared modules.prefix_length=8",
    ],
)
def test_nothing_that_fits_together_is_refused(assignments):
    changed = Config().override(assignments.split())
    assert config.from_dict(config.to_dict(changed)) == changed != Config()


def test_a_file_with_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="unknown key of model: 'backbon'; did you mean backbone"):
        config.from_dict({"model": {"backbon": "x"}})
    with pytest.raises(ValueError, match="model: expected a table"):
        config.from_dict({"model": 3})
