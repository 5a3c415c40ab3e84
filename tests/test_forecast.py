"""What a run is said to cost: against formulas, a real forward and backward pass, and DeepSpeed's own defaults."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_launch import script

from hyperpelt_ds import counts, recipes
from hyperpelt_ds.backbones.shapes import untrained
from hyperpelt_ds.backbones.sharded import Sizes
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Batch, Sample
from hyperpelt_ds.forecast import memory, step_time, tables
from hyperpelt_ds.forecast.micro_batch import Look, MicroBatch, Mix, look
from hyperpelt_ds.kernels.cases import AdapterCase
from hyperpelt_ds.kernels.plan import plan
from hyperpelt_ds.train import deepspeed_json, traffic, zero
from hyperpelt_ds.train.traffic import Parameter
from hyperpelt_ds.train.zero import Setup

ZERO = ROOT / "ds_configs"
TRAINABLES = (Parameter(900_000, "Linear"), Parameter(100_000, "Embedding"))
MICRO = MicroBatch(kept=1000, generated=10, forward_flops=3, backward_flops=4)
FROZEN = Sizes(groups=(512, 256), rest=52)


@pytest.fixture
def small(config: Config) -> Config:
    """The tiny backbone of the tests with adapters alone."""
    return config.override(["modules.kinds=adapter", "hypernet.conditions=task", "vision.encoder=null"])


def at(stage: int, world_size: int, **changes: object) -> Setup:
    config = recipes.get("glue_t5_base").override([f"train.global_batch={64 * world_size}", f"data.lanes={world_size}"])
    return dataclasses.replace(zero.read(ZERO / f"zero{stage}.json", config, world_size), **changes)


def test_a_setup_is_what_the_json_and_the_recipe_say():
    found = at(2, 4)
    assert (found.stage, found.world_size, found.micro_batch, found.accumulation) == (2, 4, 32, 2)
    assert (found.weights, found.reduced, found.autocast) == (torch.float32, torch.float32, torch.bfloat16)
    assert (found.bucket, found.buckets, found.halved, found.offloads_optimizer) == (50_000_000, 2, (), False)


def test_defaults_are_deepspeeds():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = DeepSpeedZeroConfig(stage=3).model_dump(by_alias=True)
    assert {name: theirs[name] for name in zero.DEFAULTS} == zero.DEFAULTS
    not_counted = zero._NOT_COUNTED.items()
    assert [name for name, value in not_counted if theirs[name] != value] == []


def test_what_is_not_counted_is_refused(tmp_path):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}))
    config = recipes.get("glue_t5_base")
    with pytest.raises(ValueError, match="zero_quantized_weights is True, which is not counted"):
        zero.read(file, config, 4)
    with pytest.raises(ValueError, match="--world_size must be at least 1, got 0"):
        zero.read(ZERO / "zero2.json", config, 0)


@pytest.mark.parametrize("stage, passes", [(0, 2), (1, 2 + 1), (2, 2 * 2 + 1), (3, 2 * (1 + 1))])
def test_every_stage_sends_its_passes_over_the_trainables(stage, passes):
    """With two micro-batches: gradients go around twice, or once at stage 3 with NCCL; weights once."""
    found = traffic.per_rank(at(stage, 4, persistent=0), TRAINABLES, "nccl")
    assert found.gradients + found.weights == pytest.approx(passes * 3 / 4 * 4_000_000)
    assert 0 < found.control < 10_000
    gloo = traffic.per_rank(at(stage, 4, persistent=0), TRAINABLES, "gloo")
    assert gloo.gradients == (2 if stage == 3 else 1) * found.gradients and gloo.weights == found.weights


def test_a_run_foretells_the_same_bytes_from_its_own_model(small):
    model = counts.model_of(small, untrained(small.model.backbone, 0.0), 4)
    seen = look(small, 4, Mix(2, 2, 0), None, torch.float32)
    for stage in range(4):
        settings = deepspeed_json.merge(ZERO / f"zero{stage}.json", small, 2)
        found = traffic.of_run(model, small, settings, 2, "gloo")
        assert found == traffic.per_rank(zero.read(ZERO / f"zero{stage}.json", small, 2), seen.trainables, "gloo")
        assert found is not None and found.total > 4 * counts.estimate(small, 4).trainable


def test_a_run_says_nothing_where_no_formula_holds(small):
    model = counts.model_of(small, untrained(small.model.backbone, 0.0), 4)

    def said(config: Config, stage: int, **zero: object) -> object:
        settings = deepspeed_json.merge(ZERO / f"zero{stage}.json", config, 2)
        return traffic.of_run(model, config, _with(settings, zero), 2, "gloo")

    assert said(small, 3) is not None
    assert said(small, 3, zero_quantized_weights=True) is None
    assert said(small.override(["model.shard_backbone=true", "model.dtype=bfloat16"]), 0) is None
    next(model.parameters()).requires_grad_(False)
    assert said(small, 2) is not None and said(small, 3) is None, "stage 3 gathers what is not trained as well"


def _with(settings: dict[str, Any], zero: dict[str, object]) -> dict[str, Any]:
    return {**settings, "zero_optimization": {**settings["zero_optimization"], **zero}}


def test_one_rank_sends_nothing():
    sent = [traffic.per_rank(at(stage, 1), TRAINABLES, "gloo") for stage in range(4)]
    assert [found.total for found in sent] == [0, 0, 0, 0]


def test_stage_3_gathers_small_parameters_once_a_step_and_far_ones_twice():
    once = traffic.per_rank(at(3, 2, persistent=100_001), TRAINABLES, "nccl").weights
    assert once == (2 * 900_000 + 100_000) * 4 / 2
    twice = traffic.per_rank(at(3, 2, persistent=0, kept_ahead=0), TRAINABLES, "nccl").weights
    half = traffic.per_rank(at(3, 2, persistent=0, kept_ahead=1_000_000), TRAINABLES, "nccl").weights
    assert (twice, half) == (2 * 2 * 4_000_000 / 2, 2 * 1.5 * 4_000_000 / 2)


def test_types_decide_how_wide_a_number_is_on_the_wire():
    half = at(2, 2, weights=torch.bfloat16, reduced=torch.bfloat16)
    whole = at(2, 2)
    sent = [traffic.per_rank(found, TRAINABLES, "nccl") for found in (half, whole)]
    assert (sent[0].gradients, sent[0].weights) == (sent[1].gradients / 2, sent[1].weights / 2)
    some = traffic.per_rank(at(2, 2, halved=("Linear",)), TRAINABLES, "nccl")
    assert some.gradients == 2 * 2 * (900_000 * 2 + 100_000 * 4) / 2 and some.weights == sent[1].weights


def test_each_stage_shards_one_thing_more():
    held = [memory.per_rank(at(stage, 4, persistent=0), TRAINABLES, FROZEN, MICRO) for stage in range(4)]
    whole, share = 4_000_000, 1_000_000
    assert [parts["optimizer state"] for parts in held] == [2 * whole, 2 * share, 2 * share, 2 * share]
    assert [parts["gradients"] for parts in held] == [whole, whole, share, share]
    assert [parts["trainable weights"] for parts in held] == [whole, whole, whole, share]
    assert [parts["gathered weights"] for parts in held] == [0, 0, 0, whole]
    for parts in held:
        assert parts["frozen backbone"] == 512 + 256 + 52 and parts["kept activations"] == 1000
        assert parts["generated weights"] == parts["generated weights' gradients"] == 10


def test_offloading_moves_the_optimizer_to_the_host():
    near, far = at(2, 2), at(2, 2, offloads_optimizer=True)
    here, there = (memory.per_rank(found, TRAINABLES, FROZEN, MICRO) for found in (near, far))
    assert here["optimizer state"] and not there["optimizer state"] and not there["float32 masters"]
    assert (memory.on_host(near, TRAINABLES), memory.on_host(far, TRAINABLES)) == (0, 4 * 4 * 500_000)


def test_what_is_kept_and_computed_is_that_of_a_real_pass(config):
    """The same model with memory: what it keeps between forward and backward, byte for byte, and its FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode

    mix = Mix(samples=4, tasks=2, images=3)
    found = look(config, 4, mix, None, torch.float32).micro_batch
    torch.manual_seed(0)
    model = counts.model_of(config, untrained(config.model.backbone, config.model.dropout), 4).train()
    data, vision = config.data, config.vision
    ids, labels = (torch.ones(4, size, dtype=torch.long) for size in (data.max_source_length, data.max_target_length))
    batch = Batch(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, targets=torch.arange(labels.numel()),
        tasks=torch.tensor([0, 1]), task_rows=torch.tensor([0, 0, 1, 1]),
        images=torch.ones(3, vision.cells, vision.channels), image_rows=torch.tensor([0, 0, 1, 2]),
        loss_weights=torch.ones(4), samples=tuple(Sample(str(i), "", "", "", image="x") for i in range(4)),
    )  # fmt: skip
    own = [*model.parameters(), *model.backbone.model.parameters(), model.backbone.initial_norms]
    frozen = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in frozen:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(batch).loss
        loss.backward()
    assert found.forward_flops + found.backward_flops == counter.get_total_flops() > 0
    real = sum(storage.nbytes() for storage in kept.values())
    assert real - found.generated <= found.kept <= real and found.generated > 0


def test_generated_weights_are_those_of_the_kernels_plan(small):
    found = look(small, 4, Mix(4, 3, 0), None, torch.float32)
    modules, hyper = small.modules, small.hypernet
    case = AdapterCase("here", 4, 1, 16, modules.bottleneck, hyper.hyper_size, sites=4, conditions=3)
    scales = 4 * case.sites
    assert found.micro_batch.generated == plan(case).costs[0].generated_bytes + scales


def test_more_of_a_mix_costs_more_and_a_longer_backbone_is_no_trainable(small):
    one, three = (look(small, 4, Mix(4, tasks, 0), None, torch.float32) for tasks in (1, 3))
    scales = 4 * 4
    assert three.micro_batch.generated - scales == 3 * (one.micro_batch.generated - scales)
    half = look(small.override(["model.dtype=bfloat16"]), 4, Mix(4, 1, 0), None, torch.float32)
    assert 2 * half.frozen.held(1) == pytest.approx(one.frozen.held(1), rel=0.05)  # up to padding
    assert half.trainables == one.trainables
    assert half.micro_batch.kept < one.micro_batch.kept
    assert sum(p.size for p in one.trainables) == counts.estimate(small, 4).trainable


def test_what_is_made_again_in_backward_is_not_kept_but_computed_twice(small):
    mix = Mix(4, 4, 0)
    plain, again = (
        look(small.override([f"model.activation_checkpointing={value}"]), 4, mix, None, torch.float32).micro_batch
        for value in ("false", "true")
    )
    assert again.kept < plain.kept and again.backward_flops > plain.backward_flops
    assert again.forward_flops == plain.forward_flops and again.generated == plain.generated


@pytest.mark.parametrize("mix, said", [
    (Mix(4, 5, 0), "4 samples out of 4 tasks cannot have 5 different ones"),
    (Mix(4, 1, 5), "4 samples cannot have 5 different images"),
    (Mix(4, 1, 2), "2 images in a micro-batch, but vision.encoder is not set"),
])  # fmt: skip
def test_a_mix_that_cannot_be_is_refused(small, mix, said):
    with pytest.raises(ValueError, match=said):
        look(small, 4, mix, None, torch.float32)


def test_a_step_is_the_sum_of_its_parts():
    machine = step_time.Machine(flops=7.0, inside=2e6, between=1e6, per_node=2, hop=0.0, message=0.0, samples=64.0)
    found = at(2, 2)
    sent = traffic.per_rank(found, TRAINABLES, "nccl")
    time = step_time.predict(found, MICRO, sent, 0, machine)
    assert time.compute == 2 * 7 / 7 and time.waiting == 2 * 32 / 64
    assert time.communication == (sent.gradients + sent.weights) / 2e6
    assert time.total == time.compute + time.waiting + time.communication
    assert step_time.predict(found, MICRO, sent, 1, machine).waiting == 0, "read while the rest is computed"
    more = at(2, 4)
    slower = step_time.predict(more, MICRO, traffic.per_rank(more, TRAINABLES, "nccl"), 0, machine)
    assert slower.communication == pytest.approx(1.5 * 2 * time.communication) and slower.efficiency < time.efficiency
    alone = at(2, 1)
    nothing = traffic.per_rank(alone, TRAINABLES, "nccl")
    assert step_time.predict(alone, MICRO, nothing, 0, machine).communication == 0


def test_the_command_prints_what_is_foretold(config, monkeypatch, capsys, tmp_path):
    tree = dataclasses.asdict(config)
    values = [
        f"{section}.{key}={json.dumps(value)}"
        for section, fields in tree.items() if isinstance(fields, dict)
        for key, value in fields.items() if value != dataclasses.asdict(recipes.get("demo"))[section][key]
    ]  # fmt: skip
    arguments = ["--recipe", "demo", *values, "--ds_config", str(ZERO / "zero2_cpu.json"), "--world_size", "2"]
    arguments += ["--tasks", "4", "--batch_images", "1", "--backend", "gloo"]

    def printed(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["launch/estimate.py", *arguments, *more])
        script("command").run(script("estimate").estimate)
        return capsys.readouterr().out

    found = json.loads(printed("--json"))["forecast"]
    parts = {name: size for name, size in found["memory_bytes"].items() if name not in ("total", "on the host")}
    assert sum(parts.values()) == found["memory_bytes"]["total"] and found["micro_batch"]["images"] == 1
    assert found["setup"]["stage"] == 2 and found["sent_bytes"]["backend"] == "gloo"
    table = printed()
    assert all(name in table for name, size in parts.items() if size) and "of the frozen backbone" in table
    assert table.count("frozen") == 2, "its memory once, and what it sends"


def test_measured_bytes_of_the_docs_are_the_records():
    records = [json.loads(line) for line in (ROOT / "docs" / "results" / "wire.jsonl").read_text().splitlines()]
    assert tables.measured(records) in (ROOT / "docs" / "scaling.md").read_text()
    assert {2, 4} <= {record["world_size"] for record in records}


@pytest.mark.slow
def test_the_prediction_of_the_docs_is_what_is_computed():
    if not (ROOT / "data" / "demo" / "backbone").is_dir():
        pytest.skip("needs the demo's data (make demo)")
    page = (ROOT / "docs" / "scaling.md").read_text()
    for table in tables.scaling(tables.CASES, ZERO, step_time.Machine()).split("\n\n"):
        assert table in page


def test_a_forecast_needs_a_known_backend():
    config = recipes.get("glue_t5_base")
    with pytest.raises(ValueError, match="backend 'mpi': allowed are gloo, nccl"):
        tables.forecast(config, ZERO / "zero2.json", 4, 8, Mix(32, 8, 0), "mpi")


def test_a_larger_backbone_sends_nothing_more():
    seen = Look(TRAINABLES, FROZEN, MICRO)
    small, large = (
        tables.combine(at(2, 4), Mix(32, 8, 0), dataclasses.replace(seen, frozen=Sizes((size,), 0)), "nccl")
        for size in (10, 10_000_000)
    )
    assert small.traffic == large.traffic
    assert sum(large.memory.values()) - sum(small.memory.values()) == 9_999_990


def test_split_frozen_weights_are_held_in_shares_and_cross_when_they_are_used():
    """A rank receives all of what is gathered but its own share, in every micro-batch, and has one group whole."""
    micro = dataclasses.replace(MICRO, gathered=1_000_000, gathers=5)
    seen = Look(TRAINABLES, FROZEN, micro)
    whole, split = (tables.combine(at(2, 4, splits_backbone=way), Mix(32, 8, 0), seen, "nccl") for way in (False, True))
    assert (whole.memory["frozen backbone"], whole.traffic.backbone) == (512 + 256 + 52, 0)
    assert split.memory["frozen backbone"] == (512 + 256) / 4 + 512 + 52
    assert split.traffic.backbone == 2 * 3 / 4 * 1_000_000 == split.traffic.total - whole.traffic.total
    machine = step_time.Machine(inside=1e6, per_node=4, hop=0.5)
    times = [step_time.predict(found.setup, micro, found.traffic, 1, machine) for found in (whole, split)]
    assert times[1].communication - times[0].communication == pytest.approx(1.5 + 2 * 5 * 2 * 0.5)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_split_model_gathers_every_block_in_both_passes(config, checkpointing):
    """A Marian: two blocks a stack, forward and backward; the words' vectors also for decoder and logits."""
    given = config.override([f"model.activation_checkpointing={checkpointing}"])
    whole, split = (
        look(given.override([f"model.shard_backbone={way}"]), 4, Mix(4, 2, 2), None, torch.float32)
        for way in ("false", "true")
    )
    assert (whole.micro_batch.gathered, whole.micro_batch.gathers) == (0, 0) and whole.frozen == split.frozen
    blocks = sorted(split.frozen.groups)[-4:]
    assert split.micro_batch.gathered > 2 * sum(blocks) and split.micro_batch.gathers >= 2 * len(blocks) + 3
    assert split.micro_batch.kept >= whole.micro_batch.kept


def test_alone_nothing_is_split_and_nothing_crosses(config):
    given = config.override(["model.shard_backbone=true"])
    found = tables.forecast(given, ZERO / "zero2_cpu.json", 1, 4, Mix(2, 2, 1), "gloo")
    plain = tables.forecast(config, ZERO / "zero2_cpu.json", 1, 4, Mix(2, 2, 1), "gloo")
    assert (found.memory, found.traffic) == (plain.memory, plain.traffic) and not found.setup.splits_backbone


@pytest.mark.skipif(find_spec("torchao") is None, reason="the extra int8 is not installed")
def test_integers_are_frozen_weights_and_not_activations(config):
    whole, given = (
        look(config.override([f"model.quantize={how}"]), 4, Mix(4, 2, 2), None, torch.float32)
        for how in ("none", "int8")
    )
    assert given.frozen.held(1) < whole.frozen.held(1) and given.micro_batch.kept <= whole.micro_batch.kept
