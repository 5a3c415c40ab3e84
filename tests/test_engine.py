"""The meeting of recipe and DeepSpeed JSON, the optimizer's groups and the schedule. No process group, no DeepSpeed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import tiny
from torch import nn
from torch.utils import cpp_extension

from hyperpelt_ds.config import Config, TrainConfig
from hyperpelt_ds.hypernet.free import FreeAdapter, FreeLowRank
from hyperpelt_ds.train import deepspeed_json, engine

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Config(train=TrainConfig(global_batch=24, micro_batch=3, gradient_clipping=0.5))


def write(folder: Path, tree: object) -> Path:
    path = folder / "ds.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


def test_autos_and_absent_keys_are_filled_from_the_recipe(tmp_path):
    merged = deepspeed_json.merge(
        write(tmp_path, {"train_batch_size": "auto", "zero_optimization": {"stage": 2}}), RECIPE, 2
    )
    assert merged["train_batch_size"] == 24
    assert merged["train_micro_batch_size_per_gpu"] == 3
    assert merged["gradient_accumulation_steps"] == 4
    assert merged["gradient_clipping"] == 0.5
    assert merged["zero_optimization"] == {"stage": 2}


def test_accumulation_follows_the_world_size(tmp_path):
    path = write(tmp_path, {})
    assert [deepspeed_json.merge(path, RECIPE, world)["gradient_accumulation_steps"] for world in (1, 2, 4, 8)] == [
        8,
        4,
        2,
        1,
    ]
    merged = deepspeed_json.merge(path, RECIPE, 12)  # a rank's share is less than a micro-batch may be
    assert (merged["gradient_accumulation_steps"], merged["train_micro_batch_size_per_gpu"]) == (1, 2)


def test_the_same_fact_with_the_same_value_in_both_places_is_accepted(tmp_path):
    assert deepspeed_json.merge(write(tmp_path, {"gradient_clipping": 0.5}), RECIPE, 1)["gradient_clipping"] == 0.5


@pytest.mark.parametrize("key, given, wanted, owner", [
    ("train_batch_size", 32, 24, "train.global_batch"),
    ("train_micro_batch_size_per_gpu", 4, 3, "train.micro_batch"),
    ("gradient_accumulation_steps", 2, 4, "train.global_batch"),
    ("gradient_clipping", 1.0, 0.5, "train.gradient_clipping"),
])  # fmt: skip
def test_the_same_fact_with_different_values_is_an_error_that_names_both(tmp_path, key, given, wanted, owner):
    path = write(tmp_path, {key: given})
    with pytest.raises(ValueError) as error:
        deepspeed_json.merge(path, RECIPE, 2)
    for part in (key, str(path), repr(given), repr(wanted), owner):
        assert part in str(error.value)


@pytest.mark.parametrize("tree, message", [
    ({"optimizer": {"type": "AdamW"}}, "'optimizer' is not allowed here, the recipe owns it"),
    ({"scheduler": {"type": "WarmupLR"}}, "'scheduler' is not allowed here, the recipe owns it"),
    ({"zero_optimisation": {"stage": 2}}, "unknown key 'zero_optimisation'; did you mean zero_optimization"),
    ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage is "auto"'),
    ({"checkpoint": {"load_universal": True}}, "unknown key 'checkpoint'"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device is 'nvme'"),
    ({"comet": {"enabled": True}}, "section 'comet' is enabled and needs the package comet_ml: pip install comet_ml"),
    ({"csv_monitors": {"enabled": True}}, "unknown key 'csv_monitors'; did you mean csv_monitor"),
    ({"fp16": {"enabled": True}}, "fp16 needs ZeRO stage 1, 2 or 3"),
    ({"bf16": {"enabled": True}}, "bf16 at ZeRO stage 0 cannot accumulate in fp32"),
    (
        {
            "zero_optimization": {"stage": 2},
            "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
            "communication_data_type": "bf16",
        },
        "communication_data_type does nothing beside torch_autocast",
    ),
    ({"fp16": {"enabled": "auto"}}, 'fp16.enabled is "auto"'),
    ({"zero_optimization": 2}, "zero_optimization must be an object, got 2"),
    ("{not json", "not valid JSON"),
    ("[1]", "expected an object"),
])  # fmt: skip
def test_a_wrong_deepspeed_file_is_one_clear_error(tmp_path, tree, message):
    with pytest.raises(ValueError, match=r"ds\.json") as error:
        deepspeed_json.merge(write(tmp_path, tree), RECIPE, 1)
    assert message in str(error.value)


def test_null_is_as_good_as_nothing(tmp_path):
    tree = {"bf16": None, "zero_optimization": {"stage": 2, "offload_optimizer": None}}
    assert deepspeed_json.merge(write(tmp_path, tree), RECIPE, 1)["zero_optimization"] == {"stage": 2}


def test_processes_that_srun_started_without_a_rank_do_not_each_train_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ValueError, match="one torchrun a node"):
        engine.start_distributed()


def test_an_old_lock_is_waited_for_by_nobody(tmp_path, monkeypatch, caplog):
    """Seen: a file that torch 2.14 leaves on purpose made every start with torch 2.11 hang."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "FileBaton", object, raising=False)  # newer versions of torch do without
    old, new = (tmp_path / "py311_cpu" / f"deepspeed_{name}" / "lock" for name in ("old", "new"))
    for lock in (old, new):
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(old, (0, 0))
    engine._drop_old_locks()
    monkeypatch.delattr(cpp_extension, "FileBaton")
    os.utime(new, (0, 0))
    engine._drop_old_locks()
    assert new.exists() and not old.exists() and str(old) in caplog.text


def test_a_missing_deepspeed_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.json: no such file"):
        deepspeed_json.merge(tmp_path / "nowhere.json", RECIPE, 1)


def test_a_global_batch_that_cannot_be_shared_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"5 processes cannot share the 24 lanes of train.global_batch 24"):
        deepspeed_json.merge(write(tmp_path, {}), RECIPE, 5)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_every_shipped_file_leaves_to_the_recipe_what_is_the_recipes(path):
    tree = json.loads(path.read_text())
    recipe = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
    assert {tree[key] for key in recipe} == {"auto"}
    merged = deepspeed_json.merge(path, RECIPE, 2)
    assert merged["zero_optimization"]["stage"] == int(path.name[4]), "the name says the stage"
    assert merged["data_types"]["grad_accum_dtype"] == "fp32"
    assert ("torch_autocast" in tree) == (not path.stem.endswith("_cpu")), "GPU files compute in bf16, CPU files do not"


def test_only_weights_of_linear_maps_decay_and_every_trainable_is_in_exactly_one_group():
    network = tiny.tiny_hypernet(tiny.tiny_backbone("marian"))
    groups = engine.parameter_groups(network, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed, kept = ([names.pop(id(p)) for p in group["params"]] for group in groups)
    assert not names
    modules = dict(network.named_modules())
    assert all(isinstance(modules[name.removesuffix(".weight")], nn.Linear) for name in decayed)
    scale = "controllers.task.0.heads.adapter.scale.values"
    embedding_norm_scale = {"conditions.task.embedding.table.weight", "norms.values", scale}
    assert embedding_norm_scale < set(kept)
    assert any(name.endswith(".bias") for name in kept)


@pytest.mark.parametrize("kind", ["t5", "marian"])
def test_matrices_without_a_generator_decay_and_tied_embeddings_do_not(kind):
    backbone = tiny.tiny_backbone(kind, kinds=("adapter", "lora"))
    plain = Config().override(["hypernet.parameters=shared", "hypernet.conditions=[]", "modules.kinds=adapter,lora"])
    network = nn.ModuleList(
        [
            FreeAdapter(1, plain.modules, backbone.geometry),
            FreeLowRank(1, plain.modules, backbone.geometry.projections[0]),
            backbone.model.requires_grad_(True),
        ]
    )
    decayed = {id(p) for p in engine.parameter_groups(network, 0.1)[0]["params"]}
    assert all(id(p) in decayed for p in (network[0].down, network[0].up, network[1].down, network[1].up))
    assert id(network[0].down_bias) not in decayed
    assert id(backbone.model.get_input_embeddings().weight) not in decayed


def test_no_group_is_ever_empty():
    assert len(engine.parameter_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1
    assert len(engine.parameter_groups(nn.LayerNorm(2), 0.1)) == 1


@pytest.mark.parametrize("schedule, middle, end", [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)])
def test_the_rate_warms_up_and_then_follows_its_schedule(schedule, middle, end):
    train = dataclasses.replace(RECIPE.train, steps=110, warmup_steps=10, schedule=schedule)
    factor = engine.learning_rate_factor(train)
    assert [factor(update) for update in (0, 4, 9)] == pytest.approx([1 / 11, 5 / 11, 10 / 11])
    assert factor(10) == 1.0
    assert factor(60) == pytest.approx(middle)
    assert factor(110) == factor(10**6) == pytest.approx(end)
    assert factor(35) == pytest.approx({"linear": 0.75, "cosine": 0.5 + math.sqrt(0.5) / 2, "constant": 1.0}[schedule])


def test_without_warm_up_the_first_update_has_the_full_rate():
    assert engine.learning_rate_factor(dataclasses.replace(RECIPE.train, warmup_steps=0))(0) == 1.0


NOT_FINITE = """
import sys, torch
from torch import nn
from hyperpelt_ds import dist
from hyperpelt_ds.config import Config
from hyperpelt_ds.train import engine

config = Config().override(["train.global_batch=1", "train.micro_batch=1", "train.warmup_steps=0"])
engine.start_distributed()
wrapped = engine.start(nn.Linear(4, 2), config, sys.argv[1])

def step(factor):
    wrapped.backward(wrapped.forward(torch.ones(1, 4), last=True).sum() * factor)
    applied = wrapped.step()
    return applied, wrapped.weights()["weight"]

first, good = step(1.0)
for factor in (float("inf"), float("nan")):
    applied, weight = step(factor)
    assert not applied and torch.equal(weight, good), (applied, weight, good)
last, moved = step(1.0)
assert first and last and moved.isfinite().all() and not torch.equal(moved, good)
dist.leave()
"""


@pytest.mark.slow
def test_deepspeed_itself_trains_what_takes_no_part_in_a_step_at_stage_3_alone(run_python, tmp_path):
    """Once more with the gradient of the step before (0.19.8): why ours all take part, and the first step looks."""
    done = run_python("python", "tests/raw_deepspeed.py", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    changed = json.loads((tmp_path / "changed.json").read_text())
    assert [changed[stage] > 0 for stage in "0123"] == [False, False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_whose_gradient_is_not_finite_changes_no_weight_at_any_stage(tmp_path, run_python, stage):
    script, settings = tmp_path / "script.py", {"gradient_clipping": "auto", "zero_optimization": {"stage": stage}}
    script.write_text(NOT_FINITE)
    done = run_python("python", script, write(tmp_path, settings))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_full_fine_tuning_is_refused_at_stage_3_where_ranks_would_wait_for_each_other():
    whole = Config().override(["model.train_backbone=true", "modules.kinds=", "train.global_batch=16"])
    with pytest.raises(ValueError, match=r"ZeRO stage 3 cannot train the backbone .* use stage 0, 1 or 2"):
        deepspeed_json.merge("ds_configs/zero3_cpu.json", whole, 1)
    assert deepspeed_json.merge("ds_configs/zero2_cpu.json", whole, 1)["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, True),
        ({"torch_autocast": {"enabled": False, "dtype": "float16"}}, False),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, False),
        ({"fp16": {"enabled": True}}, True),
        ({}, False),
    ],
)
def test_float16_is_seen_wherever_the_json_asks_for_it(settings, expected):
    assert deepspeed_json.computes_in_float16(settings) is expected


WAITS = """
import sys, torch
from torch import nn
from deepspeed.accelerator import get_accelerator
from hyperpelt_ds import dist
from hyperpelt_ds.config import Config
from hyperpelt_ds.train import engine

config = Config().override(["train.global_batch=4", "train.micro_batch=1", "train.warmup_steps=0"])
engine.start_distributed()
wrapped = engine.start(nn.Linear(4, 2), config, sys.argv[1])
accelerator, waits = get_accelerator(), []
accelerator.synchronize = lambda *_: waits.append(1)
for step in range(4):
    for number in range(4):
        wrapped.backward(wrapped.forward(torch.ones(1, 4), last=number == 3).sum())
    wrapped.step()
print("waits", len(waits))
dist.leave()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_no_step_waits_for_the_device_to_be_timed(tmp_path, run_python, stage):
    """DeepSpeed's own default does, twice in every micro-batch after the second step (seen in 0.19.8)."""
    (tmp_path / "script.py").write_text(WAITS)
    settings = {"gradient_clipping": "auto", "zero_optimization": {"stage": stage}}
    done = run_python("python", tmp_path / "script.py", write(tmp_path, settings))
    assert done.returncode == 0 and "waits 0" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
