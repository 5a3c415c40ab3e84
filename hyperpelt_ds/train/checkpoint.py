"""Checkpoints: one format for every ZeRO stage and world size, committed whole or not at all, verified before use.

    run_dir/step_00000100/   weights.safetensors   fp32, by parameter name
                             moments.safetensors   the optimizer's, fp32, by its name for them and parameter name
                             random.json           random number generators of each rank
                             state.json            step, data position, best score, counters, what the run was
                             MANIFEST.json         format, step, size and sha256 of every file above, written last
    run_dir/LATEST           name of the newest folder
    run_dir/best/            weights.safetensors and score.json of the best validation

docs/checkpoints.md says what may change when a run goes on. This file must not know how training works, what an engine
keeps where, nor how a file gets to the disk.
"""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from hyperpelt_ds import config as configuration
from hyperpelt_ds import dist
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import StreamState
from hyperpelt_ds.train import commit, randomness
from hyperpelt_ds.train.engine import Engine
from hyperpelt_ds.train.partitions import Snapshot

FORMAT = 2
"""To be raised when older code could not read what is written, or newer code not what was."""

WEIGHTS = "weights.safetensors"
MOMENTS = "moments.safetensors"
RANDOM = "random.json"
STATE = "state.json"
LATEST = "LATEST"
BEST = "best"

MOST_FAILURES = 3
"""So many checkpoints in a row that cannot be written stop a run."""

# What may differ between a run and its continuation: places (what lies there is checked by content), when things
# happen, and how a step's work is cut up. All else would quietly make it another run; so would the number of steps,
# unless the learning rate is constant.
_FREE_TO_CHANGE = [
    "recipe",
    "model.backbone",
    "model.activation_checkpointing",
    "model.shard_backbone",
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
    "train.keep_every",
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

log = dist.logger(__name__)


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


class Saver:
    """Writes a run's checkpoints: a save waits for the copy to rank 0's host, a thread there does the rest.

    Every rank makes one and calls its methods together. A disk that is full or fails costs a checkpoint and a warning;
    what was there before stays. `backbone` is the fingerprint of the frozen weights.
    """

    def __init__(self, run_dir: Path, config: Config, backbone: str):
        self._run_dir, self._config, self._backbone = run_dir, config, backbone
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._failures = 0
        if dist.rank() == 0:
            commit.recover(run_dir / BEST)
            commit.tidy(run_dir)

    def save(self, engine: Engine, progress: Progress) -> None:
        """Begins to write the checkpoint of `progress.step`, once the one before is written; raises as `wait` does."""
        self.wait()
        snapshot = engine.snapshot()
        state = {
            "progress": dataclasses.asdict(progress),
            "training": snapshot.counters,
            "world_size": dist.world_size(),
            "zero_stage": engine.stage,
            "precision": engine.precision,
            "backbone": self._backbone,
            "config": configuration.to_dict(self._config),
        }
        generators = dist.gather(randomness.state())
        write = _commit if dist.rank() == 0 else _nothing
        folder = self._run_dir / _name(progress.step)
        train = self._config.train
        keep = train.keep_checkpoints, train.keep_every
        self._writing = self._thread.submit(write, folder, snapshot, generators, state, keep)

    def save_best(self, engine: Engine, step: int, score: float, scores: dict[str, dict[str, float]]) -> bool:
        """Replaces run_dir/best by the weights as they are now; whether that could be written. Waits for it."""
        weights = engine.weights()
        fault = None
        if dist.rank() == 0:
            try:
                score_of = {"step": step, "score": score, "tasks": scores}
                commit.write_folder(self._run_dir / BEST, {WEIGHTS: weights, "score.json": score_of}, None)
            except OSError as error:
                fault = str(error)
                log.warning("the best weights, of step %d, could not be written: %s", step, fault)
        return dist.gather(fault)[0] is None

    def close(self, needed: bool = True) -> None:
        """Waits for the last checkpoint; raises OSError on every rank if it is needed and could not be written."""
        self.wait()
        self._thread.shutdown()
        if needed and self._failures:
            raise OSError(f"{self._run_dir}: the last checkpoint could not be written; --resume goes on before it")

    def wait(self) -> None:
        """Waits for what is being written; what went wrong, every rank learns.

        Raises OSError on every rank if it was the third in a row that could not be.
        """
        if self._writing is None:
            return
        error = self._writing.exception()
        self._writing = None
        fault, survivable = dist.gather((error and repr(error), isinstance(error, OSError)))[0]
        if fault is not None and not survivable:
            raise RuntimeError(f"{self._run_dir}: writing a checkpoint failed: {fault}") from error
        self._failures = self._failures + 1 if fault else 0
        if fault:
            log.warning("%s: a checkpoint could not be written, %d in a row: %s", self._run_dir, self._failures, fault)
        if self._failures == MOST_FAILURES:
            raise OSError(f"{self._run_dir}: {self._failures} checkpoints in a row could not be written: {fault}")


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
        raise ValueError(
            f"{run_dir} has no valid checkpoint to resume from, start a new run_dir: " + "; ".join(rejected)
        )
    return found


def check(
    folder: Path, config: Config, backbone: str, world_size: int, zero_stage: int, precision: dict[str, Any]
) -> None:
    """Raises ValueError naming what differs if a verified checkpoint cannot be continued by the run described: another
    backbone, task list or configuration. Another number of ranks, ZeRO stage or precision is logged."""
    state = _read_state(folder)
    if state["backbone"] != backbone:
        raise ValueError(
            f"{folder} was trained on a backbone with fingerprint {state['backbone'][:12]}, "
            f"but {config.model.backbone} has {backbone[:12]}: the frozen weights differ; put back the one it "
            f"had, or start a new run_dir"
        )
    # a field that did not exist when the checkpoint was written had the effect of what is now its default
    now, defaults = _flat(configuration.to_dict(config)), _flat(configuration.to_dict(Config()))
    saved = defaults | _flat(state["config"])
    if saved["data.tasks"] != now["data.tasks"]:
        raise ValueError(
            f"{folder} was trained on tasks {saved['data.tasks']}, this run has {now['data.tasks']}; give "
            f"data.tasks as it was, or add tasks in a new run_dir with --init_from and --new_task"
        )
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
            log.info("%s was saved with %s %s, this run has %s", folder, what, old, new)


def load(folder: Path, engine: Engine, seed: int) -> Progress:
    """Restores engine and random state from a checkpoint that passed `newest` and `check`; where the run stood.

    On another number of ranks, random numbers are drawn from `seed`, the step and the rank: dropout is another.
    """
    state = _read_state(folder)
    moments: dict[str, dict[str, Tensor]] = {}
    for place, tensor in load_file(folder / MOMENTS).items():
        kind, name = place.split("/", 1)
        moments.setdefault(kind, {})[name] = tensor
    engine.restore(Snapshot(load_file(folder / WEIGHTS), moments, state["training"]))
    progress = state["progress"]
    generators = json.loads((folder / RANDOM).read_text())
    if len(generators) == dist.world_size():
        randomness.restore(generators[dist.rank()])
    else:
        randomness.seed(seed, progress["step"], dist.world_size(), dist.rank())
    return Progress(**{**progress, "stream": StreamState(**progress["stream"])})


def _commit(
    folder: Path, snapshot: Snapshot, generators: list[Any], state: dict[str, Any], keep: tuple[int, int]
) -> None:
    """Writes a checkpoint, says so in LATEST, and lets go of older ones.

    `keep`: how many of the newest stay, and, if not 0, what divides the steps of others that do.

    Where it stops, killed or for an OSError, the run has the checkpoints it had before, or one more.
    """
    moments = {f"{kind}/{name}": moment for kind, own in snapshot.moments.items() for name, moment in own.items()}
    contents = {WEIGHTS: snapshot.weights, MOMENTS: moments, RANDOM: generators, STATE: state}
    commit.write_folder(folder, contents, {"format": FORMAT, "step": state["progress"]["step"]})
    commit.replace_text(folder.parent / LATEST, folder.name)
    newest, every = keep
    for old in _folders(folder.parent)[newest:]:
        if old < folder and not (every and _step(old) % every == 0):
            commit.remove(old)
    log.info("%s is written", folder)


def _nothing(*_: Any) -> None:
    """What the other ranks write."""


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


def _fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
    try:
        manifest = commit.read_manifest(folder)
        if manifest.get("format", 1) != FORMAT:
            return f"it has format {manifest.get('format', 1)}, this version reads format {FORMAT}"
        if folder.name != _name(manifest["step"]):
            return f"{commit.MANIFEST} is of step {manifest['step']}"
        for name in (WEIGHTS, MOMENTS, RANDOM, STATE):
            if name not in manifest["files"]:
                return f"{commit.MANIFEST} does not list {name}"
        return commit.fault(folder, manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{commit.MANIFEST} cannot be read: {error}"


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
