"""Checkpoints of the trainables: written whole or not at all, verified before they are trusted.

    run_dir/step_00000100/   weights.safetensors   fp32, by parameter name, gathered from any ZeRO stage
                             deepspeed/            the engine's own state: optimizer and schedule
                             rank_0.json ...       random number generators of each rank
                             state.json            step, data position, best score, what the run was
                             MANIFEST.json         size and sha256 of every file above, written last
    run_dir/LATEST           name of the newest folder
    run_dir/best/            weights.safetensors and score.json of the best validation

This file must not know how training works, nor what DeepSpeed writes into its folder.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import logging
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from hyperpelt_ds import config as configuration
from hyperpelt_ds import dist
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import StreamState
from hyperpelt_ds.train.engine import Engine

WEIGHTS = "weights.safetensors"
STATE = "state.json"
MANIFEST = "MANIFEST.json"
LATEST = "LATEST"

# What may differ between a run and its continuation: places (what lies there is checked by content), when things
# happen, and how a step's work is cut up. All else would quietly make it another run; so would the number of steps,
# unless the learning rate is constant.
_FREE_TO_CHANGE = [
    "recipe",
    "model.backbone",
    "model.activation_checkpointing",
    "vision.weights",
    "data.manifest",
    "data.workers",
    "data.cache",
    "data.cache_gb",
    "data.max_holes",
    "data.max_hole_share",
    "train.micro_batch",
    "train.micro_tokens",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.eval_every",
    "train.patience",
    "train.max_consecutive_skips",
    "train.check_every",
    "train.start_limit",
    "train.step_limit",
    "train.eval_limit",
    "train.save_limit",
    "eval.batch_size",
    "eval.samples_per_task",
    "eval.num_beams",
    "transfer.init_from",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a run stands: the same on every rank but for `seconds`, the time its steps, validations and saves took.

    `stale` counts validations since the best one.
    """

    step: int
    stream: StreamState
    best_score: float | None = None
    stale: int = 0
    seconds: float = 0.0


def save(run_dir: Path, engine: Engine, progress: Progress, config: Config, backbone: str) -> Path:
    """Writes the checkpoint of `progress.step`, then removes all but the newest train.keep_checkpoints.

    `backbone` is the fingerprint of the frozen weights. A folder appears under its name only when it is complete.
    """
    folder = run_dir / f"step_{progress.step:08d}"
    partial = folder.with_suffix(".partial")
    if dist.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save(partial / "deepspeed")
    weights = engine.weights()
    (partial / f"rank_{dist.rank()}.json").write_text(json.dumps(_random_state()))
    dist.barrier()
    if dist.rank() == 0:
        save_file(weights, partial / WEIGHTS)
        state = {
            "progress": dataclasses.asdict(progress),
            "world_size": dist.world_size(),
            "zero_stage": engine.stage,
            "precision": engine.precision,
            "backbone": backbone,
            "config": configuration.to_dict(config),
        }
        _write_json(partial / STATE, state)
        _write_json(partial / MANIFEST, {"files": {str(f.relative_to(partial)): _sum(f) for f in _files(partial)}})
        _replace_folder(partial, folder)
        _replace_text(run_dir / LATEST, folder.name)
        for old in _folders(run_dir)[config.train.keep_checkpoints :]:
            if old < folder:
                shutil.rmtree(old)
    dist.barrier()
    return folder


def save_best(run_dir: Path, engine: Engine, step: int, score: float, scores: dict[str, dict[str, float]]) -> None:
    """Replaces run_dir/best by the weights as they are now."""
    weights = engine.weights()
    if dist.rank() == 0:
        partial = run_dir / "best.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(weights, partial / WEIGHTS)
        _write_json(partial / "score.json", {"step": step, "score": score, "tasks": scores})
        _replace_folder(partial, run_dir / "best")
    dist.barrier()


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint whose manifest verifies; None if there never was one. Every rank gets rank 0's answer.

    A rejected checkpoint is logged with the reason. Raises ValueError if there are some but none is valid.
    """
    found, rejected = None, []
    if dist.rank() == 0:
        for folder in _folders(run_dir):
            reason = _fault(folder)
            if reason is None:
                found = folder
                break
            rejected.append(f"{folder.name}: {reason}")
            log.warning("checkpoint %s rejected: %s", folder, reason)
    found, rejected = dist.gather((found, rejected))[0]
    if found is None and rejected:
        raise ValueError(f"{run_dir} has no valid checkpoint to resume from: " + "; ".join(rejected))
    return found


def check(
    folder: Path, config: Config, backbone: str, world_size: int, zero_stage: int, precision: dict[str, Any]
) -> None:
    """Raises ValueError naming what differs if a verified checkpoint cannot be continued by the run described: another
    backbone, task list, configuration, number of ranks, ZeRO stage or precision."""
    state = _read_state(folder)
    if state["backbone"] != backbone:
        raise ValueError(
            f"{folder} was trained on a backbone with fingerprint {state['backbone'][:12]}, "
            f"but {config.model.backbone} has {backbone[:12]}: the frozen weights differ"
        )
    # a field that did not exist when the checkpoint was written had the effect of what is now its default
    now, defaults = _flat(configuration.to_dict(config)), _flat(configuration.to_dict(Config()))
    saved = defaults | _flat(state["config"])
    if saved["data.tasks"] != now["data.tasks"]:
        raise ValueError(f"{folder} was trained on tasks {saved['data.tasks']}, this run has {now['data.tasks']}")
    free = [*_FREE_TO_CHANGE, "train.steps"] if config.train.schedule == "constant" else _FREE_TO_CHANGE
    changed = [name for name in now if name not in free and saved.get(name) != now[name]]
    if changed:
        differences = ", ".join(f"{name} was {saved.get(name)!r}, is {now[name]!r}" for name in changed)
        raise ValueError(f"{folder} belongs to another run: {differences}; start a new run_dir for these")
    for what, old, new in (
        ("processes", state["world_size"], world_size),
        ("ZeRO stage", state["zero_stage"], zero_stage),
        ("precision", state["precision"], precision),
    ):
        if old != new:
            raise ValueError(f"{folder} was saved with {what} {old}, this run has {new}; resume it with {old}")


def load(folder: Path, engine: Engine) -> Progress:
    """Restores engine and random state from a checkpoint that passed `newest` and `check`; where the run stood."""
    engine.load(folder / "deepspeed")
    _restore_random_state(json.loads((folder / f"rank_{dist.rank()}.json").read_text()))
    progress = _read_state(folder)["progress"]
    fields = {field.name for field in dataclasses.fields(StreamState)}
    if set(progress["stream"]) != fields:
        raise ValueError(f"{folder} was written by an older version: its data position cannot be read; start a new run")
    return Progress(**{**progress, "stream": StreamState(**progress["stream"])})


def _read_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, value in tree.items():
        flat.update(
            {f"{section}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {section: value}
        )
    return flat


def _folders(run_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((f for f in run_dir.glob("step_*") if f.is_dir() and not f.suffix), reverse=True)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _sum(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
    try:
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        for name in (WEIGHTS, STATE):
            if name not in listed:
                return f"{MANIFEST} does not list {name}"
        for name, expected in listed.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["size"]:
                return f"{name} has {file.stat().st_size} bytes, expected {expected['size']}"
            if _sum(file) != expected:
                return f"{name} has another sha256"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def _random_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": _encode(torch.get_rng_state()),
        "cuda": _encode(torch.cuda.get_rng_state()) if dist.has_gpu() else None,
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_decode(state["torch"]))
    if state["cuda"] is not None and dist.has_gpu():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _encode(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=1) + "\n")


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n")
    os.replace(partial, path)


def _replace_folder(new: Path, place: Path) -> None:
    """Renames `new` to `place`; what was there (an older best, a rejected checkpoint) goes first."""
    old = place.with_name(place.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)
