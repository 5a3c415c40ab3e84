"""The DeepSpeed JSON of a run: what it may say, and how the recipe fills it.

Two places say how a run is made, and each owns its facts; the same fact given in both with two values is an error. This
file must not know DeepSpeed itself, only the names of its sections.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hyperpelt_ds.config import Config
from hyperpelt_ds.data import batching
from hyperpelt_ds.data.order import lane_count

# What a run may say to DeepSpeed. DeepSpeed ignores a top-level key that it does not know, so a misspelt section would
# silently train something else. Left out on purpose: optimizer and scheduler (the recipe's), amp, elasticity, data
# efficiency (they assume its own data loader), checkpoint (train/checkpoint.py).
_SECTIONS = [
    "zero_optimization",
    "bf16",
    "fp16",
    "torch_autocast",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "timers",
    "memory_breakdown",
    "steps_per_print",
    "dump_state",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
]

_OBJECTS = ["zero_optimization", "bf16", "fp16", "torch_autocast", "data_types"]
MONITORS = ["csv_monitor", "wandb", "comet", "tensorboard"]
_PACKAGES = {"wandb": "wandb", "comet": "comet_ml"}
"""Of the sections that need one besides DeepSpeed's own."""

PRECISION = ["bf16", "fp16", "torch_autocast", "data_types"]

# For a JSON that does not mention them. DeepSpeed's own defaults are: accumulate in the model's type (bf16 loses small
# gradients), print, and wait for the device twice in every micro-batch to time it.
_DEFAULTS: dict[str, Any] = {
    "data_types": {"grad_accum_dtype": "fp32"},
    "steps_per_print": 2**31,
    "timers": {"throughput": {"enabled": False}},
}


def merge(path: str | Path, config: Config, world_size: int) -> dict[str, Any]:
    """The DeepSpeed JSON at `path` with every "auto" filled from the recipe.

    Raises ValueError for a missing or broken file, an unknown section, a section that the recipe owns, the same fact
    given in both places with different values, full fine-tuning at ZeRO stage 3, fp16 at stage 0, what DeepSpeed would
    refuse late or leave undone, offload to NVMe, and a monitor without its package.
    """
    tree = _read(Path(path))
    train = config.train
    lanes = lane_count(train.global_batch, config.data.lanes)
    accumulation = batching.accumulation(train.global_batch, train.micro_batch, lanes, world_size)
    micro_batch = train.global_batch // world_size // accumulation
    recipe = {
        "train_batch_size": (train.global_batch, "train.global_batch"),
        "train_micro_batch_size_per_gpu": (micro_batch, "train.micro_batch"),
        "gradient_accumulation_steps": (accumulation, f"train.global_batch / (train.micro_batch x {world_size})"),
        "gradient_clipping": (train.gradient_clipping, "train.gradient_clipping"),
    }
    for key in tree:
        if key in ("optimizer", "scheduler"):
            raise ValueError(f"{path}: section {key!r} is not allowed here, the recipe owns it (train.* of the config)")
        if key not in recipe and key not in _SECTIONS + MONITORS:
            near = difflib.get_close_matches(key, [*recipe, *_SECTIONS, *MONITORS], 3, 0.4) or _SECTIONS
            raise ValueError(f"{path}: unknown key {key!r}; did you mean {', '.join(near)}?")
    for key, (value, owner) in recipe.items():
        given = tree.get(key, "auto")
        if given not in ("auto", value):
            raise ValueError(
                f'{key}: {path} says {given!r}, the recipe says {value!r} ({owner}); write "auto" in the JSON'
            )
        tree[key] = value
    for name in _autos(tree):
        raise ValueError(f'{path}: {name} is "auto", but the recipe has no value for it; give one')
    for fault in _faults(tree, config):
        raise ValueError(f"{path}: {fault}")
    return {**_DEFAULTS, **tree}


def _faults(tree: dict[str, Any], config: Config) -> Iterator[str]:
    """What cannot be done, or not safely, of what a JSON of known sections asks for."""
    zero, autocast = tree.get("zero_optimization", {}), tree.get("torch_autocast", {})
    stage = zero.get("stage", 0)
    halved = [name for name in ("bf16", "fp16") if tree.get(name, {}).get("enabled")]
    if stage == 0 and "fp16" in halved:
        yield (
            "fp16 needs ZeRO stage 1, 2 or 3; at stage 0 DeepSpeed (0.19.8) keeps its loss scale in another place, "
            "which no checkpoint would hold"
        )
    if (
        stage == 0
        and "bf16" in halved
        and tree.get("data_types", _DEFAULTS["data_types"]).get("grad_accum_dtype") == "fp32"
    ):
        yield (
            "bf16 at ZeRO stage 0 cannot accumulate in fp32 (DeepSpeed 0.19.8); use torch_autocast, another stage, or "
            "data_types.grad_accum_dtype 'bf16'"
        )
    if stage and autocast.get("enabled") and "communication_data_type" in tree:
        yield (
            "communication_data_type does nothing beside torch_autocast at ZeRO stage 1, 2 or 3, where DeepSpeed "
            "(0.19.8) takes each weight's own type; torch_autocast.lower_precision_safe_modules says which are halved"
        )
    if config.model.train_backbone and stage == 3:
        yield (
            "ZeRO stage 3 cannot train the backbone (model.train_backbone): it gathers weights when a rank needs "
            "them, and ranks decode answers of different lengths in validation; use stage 0, 1 or 2"
        )
    cast_to = str(autocast.get("dtype", "")).removeprefix("torch.")
    if config.model.shard_backbone and autocast.get("enabled") and cast_to != config.model.dtype:
        yield (
            f"torch_autocast to {cast_to!r} keeps a copy in that type of every frozen weight until the backward "
            f"pass, so that nothing is gained by model.shard_backbone; set model.dtype to the same"
        )
    for section, key in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if not tree.get(section, {}).get(key, True):
            yield f"{section}.{key} must stay true: it keeps gradients that are not finite out"
    if halved and config.transfer.train == "embeddings":
        yield (
            f"{halved[0]} rounds frozen weights too, so that tasks that are not trained would change "
            f"(transfer.train='embeddings'); use torch_autocast instead"
        )
    for offload in ("offload_optimizer", "offload_param"):
        if zero.get(offload, {}).get("device") == "nvme":
            yield f"zero_optimization.{offload}.device is 'nvme', which no checkpoint holds; use 'cpu'"
    for section, package in _PACKAGES.items():
        if tree.get(section, {}).get("enabled") and find_spec(package) is None:
            yield f"section {section!r} is enabled and needs the package {package}: pip install {package}"


def computes_in_float16(settings: dict[str, Any]) -> bool:
    """Whether merged settings ask for float16, as DeepSpeed's own mode or as autocast."""
    autocast = settings.get("torch_autocast", {})
    names = ("float16", "fp16", "half", "torch.float16")
    return bool(settings.get("fp16", {}).get("enabled") or (autocast.get("enabled") and autocast.get("dtype") in names))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"DeepSpeed configuration {path}: no such file")
    try:
        tree = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"DeepSpeed configuration {path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"DeepSpeed configuration {path}: expected an object, got {type(tree).__name__}")
    for name in (*_OBJECTS, *MONITORS):
        if not isinstance(tree.get(name, {}), dict | None):
            raise ValueError(f"DeepSpeed configuration {path}: {name} must be an object, got {tree[name]!r}")
    return _without_null(tree)


def _without_null(tree: dict[str, Any]) -> dict[str, Any]:
    """What is said, for null is as good as nothing."""
    parts = {key: _without_null(value) if isinstance(value, dict) else value for key, value in tree.items()}
    return {key: value for key, value in parts.items() if value is not None}


def _autos(tree: dict[str, Any], where: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if value == "auto":
            yield where + key
        elif isinstance(value, dict):
            yield from _autos(value, f"{where}{key}.")
