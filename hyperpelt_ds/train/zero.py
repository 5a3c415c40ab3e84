"""What a DeepSpeed configuration, a recipe and a world size decide about memory and traffic, as numbers.

Defaults are those of DeepSpeed 0.19.8. This file must not know a model, nor add anything up.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hyperpelt_ds.config import Config
from hyperpelt_ds.train import deepspeed_json

DEFAULTS: dict[str, Any] = {
    "reduce_bucket_size": 5e8,
    "reduce_scatter": True,
    "use_multi_rank_bucket_allreduce": True,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_prefetch_bucket_size": 5e7,
}
_NOT_COUNTED = {
    "use_multi_rank_bucket_allreduce": True,
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
}
_AUTOCAST_SAFE = ("Linear", "Conv1d", "Conv2d", "Conv3d")
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setup:
    """Sizes count numbers, not bytes."""

    world_size: int
    stage: int
    micro_batch: int
    accumulation: int
    weights: torch.dtype
    """What trainables are held and computed with in; half precision then has float32 masters beside it."""
    autocast: torch.dtype | None
    halved: tuple[str, ...]
    """Classes of modules whose gradients cross in the type of autocast, and at stage 3 their weights too."""
    reduced: torch.dtype
    """What the other gradients cross in."""
    accumulated: torch.dtype
    bucket: int
    buckets: int
    scatters: bool
    persistent: int
    """At stage 3 parameters below this size stay whole on every rank."""
    live: int
    kept_ahead: int
    """At stage 3 a gathered parameter is kept if it is used again within this many numbers."""
    offloads_optimizer: bool
    offloads_weights: bool
    splits_backbone: bool

    @property
    def masters(self) -> bool:
        """Whether the float32 weights that the optimizer updates are a copy of their own. Under ZeRO they always are:
        stage 3 means to share them, but compares a device with its name (measured: one more share is held)."""
        return self.stage > 0 or self.weights != torch.float32


def read(path: str | Path, config: Config, world_size: int) -> Setup:
    """The setup of a run of `config` with the DeepSpeed JSON at `path` on so many ranks.

    Raises ValueError for whatever the run itself would refuse, and for settings that are not counted here.
    """
    if world_size < 1:
        raise ValueError(f"--world_size must be at least 1, got {world_size}")
    settings = deepspeed_json.merge(path, config, world_size)
    reason = not_counted(settings)
    if reason:
        raise ValueError(f"{path}: {reason}")
    return of(settings, config, world_size)


def not_counted(settings: dict[str, Any]) -> str | None:
    """What in merged `settings` makes ranks exchange or hold something that is not counted here."""
    zero = settings.get("zero_optimization", {})
    for name, counted in _NOT_COUNTED.items():
        if zero.get(name, counted) != counted:
            return f"zero_optimization.{name} is {zero[name]!r}, which is not counted here"
    return None


def of(settings: dict[str, Any], config: Config, world_size: int) -> Setup:
    """The setup of a run of `config` with `settings` that deepspeed_json.merge made, all of which are counted."""
    zero = settings.get("zero_optimization", {})

    def size(name: str) -> int:
        return int(zero.get(name, DEFAULTS[name]))

    stage = int(zero.get("stage", 0))
    autocast = settings.get("torch_autocast", {})
    autocasts = bool(autocast.get("enabled"))
    weights = next((type_ for name, type_ in _HALF.items() if settings.get(name, {}).get("enabled")), torch.float32)
    crossing = settings.get("communication_data_type")
    overlaps = zero.get("overlap_comm")
    return Setup(
        world_size=world_size,
        stage=stage,
        micro_batch=int(settings["train_micro_batch_size_per_gpu"]),
        accumulation=int(settings["gradient_accumulation_steps"]),
        weights=weights,
        autocast=_type(autocast.get("dtype", "bfloat16")) if autocasts else None,
        halved=_halved(autocast) if autocasts and stage else (),
        reduced=weights if crossing is None else _type(crossing),
        accumulated=_type(settings["data_types"].get("grad_accum_dtype") or str(weights).removeprefix("torch.")),
        bucket=size("reduce_bucket_size"),
        buckets=2 if (stage == 3 if overlaps is None else overlaps) and stage in (1, 2) else 1,
        scatters=bool(zero.get("reduce_scatter", True)),
        persistent=size("stage3_param_persistence_threshold"),
        live=size("stage3_max_live_parameters"),
        kept_ahead=size("stage3_max_reuse_distance") + size("stage3_prefetch_bucket_size"),
        offloads_optimizer=_offloads(zero, "offload_optimizer"),
        offloads_weights=_offloads(zero, "offload_param"),
        splits_backbone=config.model.shard_backbone and world_size > 1,
    )


def _offloads(zero: dict[str, Any], name: str) -> bool:
    return bool((zero.get(name) or {}).get("device", "none") != "none")


def _halved(autocast: dict[str, Any]) -> tuple[str, ...]:
    given = autocast.get("lower_precision_safe_modules")
    return _AUTOCAST_SAFE if given is None else tuple(name.rpartition(".")[2] for name in given)


def _type(name: str) -> torch.dtype:
    short = {"fp32": "float32", "bf16": "bfloat16", "bfp16": "bfloat16", "fp16": "float16", "half": "float16"}
    found = getattr(torch, short.get(name, name.removeprefix("torch.")))
    assert isinstance(found, torch.dtype)
    return found
