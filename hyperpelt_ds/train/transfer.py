"""Starting a run from another one: its weights, and for a new task those of the task that is most like it.

It must not know how training works; it is called once, before the engine takes the trainables.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from hyperpelt_ds import config as configuration
from hyperpelt_ds import dist, task_file
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data.collate import UnusableSample, collator_for
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.data.plain import train_stream
from hyperpelt_ds.data.reader import DamagedSample, Reader
from hyperpelt_ds.model import HyperPELT, beside, identity_of, weights_file
from hyperpelt_ds.train.answering import check_features

SAMPLES = 64
"""At most so many training samples of a new task are answered to find the task that is most like it."""

log = logging.getLogger(__name__)


def requested(
    run: str | Path, new_tasks: Sequence[str], like: str | None, train: str, run_dir: str | Path, resume: bool
) -> Config:
    """The configuration of the run in `run_dir` that starts from `run`: `from_run`'s, or, to resume it, its own.

    To resume, `run` need not be there any more. Raises ValueError for other new tasks, or another `run`, `like` or
    `train`, than it was started with.
    """
    own = Path(run_dir) / "config.json"
    if not (resume and own.is_file()):
        return from_run(run, new_tasks, like, train)
    config = configuration.load(own)
    added = config.data.tasks[-len(new_tasks) :] if new_tasks else ()
    if added != tuple(new_tasks):  # what of its tasks is trained may have been changed by data.train_tasks
        raise ValueError(f"--new_task {','.join(new_tasks)}: {run_dir} was started with {', '.join(added)}")
    was = config.transfer
    for flag, given, started in (
        ("init_from", os.path.abspath(run), was.init_from),
        ("train", train, was.train),
        ("like", like, next(iter(was.like.values()), None)),
    ):
        if given is not None and given != started:
            raise ValueError(
                f"--{flag} {given}: {run_dir} was started with {started or 'none'}; --resume goes on with that"
            )
    return config


def from_run(run: str | Path, new_tasks: Sequence[str], like: str | None, train: str) -> Config:
    """The configuration of a finished run, changed to train `new_tasks` after its own.

    `like` names the task to start from. Mixture weights and data.plain do not carry over. Raises ValueError for a
    folder that is no run, a task that the run already has and a `like` that it does not have.
    """
    if not new_tasks and (like or train == "embeddings"):
        raise ValueError("--like and --train embeddings need --new_task")
    folder = Path(os.path.abspath(run))  # by its name, which is that of every node
    if not (folder / "config.json").is_file():
        raise ValueError(f"--init_from {run}: no run, it has no config.json; give the run_dir of a training")
    base = configuration.load(folder / "config.json")
    known = [name for name in new_tasks if name in base.data.tasks]
    if known:
        raise ValueError(
            f"--new_task {known[0]!r}: {run} was already trained on it; without --new_task, --init_from trains "
            f"it further"
        )
    if like is not None and "task" not in (*base.hypernet.conditions, base.hypernet.parameters):
        raise ValueError(
            f"--like {like}: in {run} nothing belongs to one task alone, so a new one starts from no other"
        )
    if like is not None and like not in base.data.tasks:
        raise ValueError(f"--like {like!r} is not one of the tasks of {run}: {', '.join(base.data.tasks)}")
    return dataclasses.replace(
        base,
        recipe="",
        data=dataclasses.replace(
            base.data, tasks=(*base.data.tasks, *new_tasks), train_tasks=tuple(new_tasks), task_weights={}, plain={}
        ),
        transfer=configuration.TransferConfig(
            str(folder),
            {name: like for name in new_tasks} if like else {},
            "embeddings" if train == "embeddings" else "all",
        ),
    )


def start(model: HyperPELT, config: Config, manifest: Manifest) -> dict[str, Any]:
    """Fills the model from config.transfer.init_from; what every new task was started from, and why.

    Every rank calls it and decides the same. Raises ValueError showing both sides where the other run does not fit.
    """
    folder = Path(config.transfer.init_from)
    base = configuration.load(folder / "config.json")
    _check(folder, base, config, model)
    check_features(manifest, config, folder)
    state, per_task = load_file(weights_file(folder)), model.per_task
    _fill(model, state, base.data.tasks)
    new = [name for name in config.data.tasks if name not in base.data.tasks]
    for name in config.transfer.like:
        if name not in new:
            raise ValueError(f"transfer.like: {name!r} is no new task; these are: {', '.join(new) or 'none'}")
    decided: dict[str, Any] = {}
    for name in new if per_task else ():
        losses: dict[str, float] = {}
        if name in config.transfer.like:
            source = config.transfer.like[name]
        else:
            losses = _losses(model, config, manifest, name, base.data.tasks)
            source = min(losses, key=losses.__getitem__)
        source = dist.gather(source)[0]
        _copy_entry(model, model.tasks.index(source), model.tasks.index(name))
        log.info("task %s starts from %s %s", name, source, {task: round(loss, 4) for task, loss in losses.items()})
        decided[name] = {"from": source, "losses": losses}
    return decided


def freeze(model: HyperPELT, config: Config) -> None:
    """Leaves only what config.transfer.train says to be trained; ValueError if that is nothing."""
    if config.transfer.train == "all":
        return
    if not model.per_task:
        raise ValueError(
            "transfer.train='embeddings': nothing belongs to one task alone; the run needs 'task' in "
            "hypernet.conditions, or hypernet.parameters='task'"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in model.per_task)


def write_task_files(run_dir: Path, model: HyperPELT, config: Config) -> list[Path]:
    """run_dir/tasks/NAME.safetensors of every trained task, from the run's best weights."""
    weights, where = load_file(weights_file(run_dir)), beside(config, identity_of(run_dir)["backbone"])
    files = []
    for name in config.trained_tasks:
        path = run_dir / "tasks" / f"{name}.safetensors"
        task_file.write(path, name, weights, model.per_task, model.tasks.index(name), where)
        files.append(path)
    return files


def _check(folder: Path, base: Config, config: Config, model: HyperPELT) -> None:
    for name in ("dtype", "quantize", "train_backbone"):
        was, is_now = getattr(base.model, name), getattr(config.model, name)
        if was != is_now:
            raise ValueError(f"transfer.init_from: {folder} has model.{name} {was!r}, this run has {is_now!r}")
    identity = identity_of(folder)
    now = model.backbone.fingerprint()
    if identity["backbone"] != now:
        raise ValueError(
            f"transfer.init_from: {folder} was trained on a backbone with fingerprint {identity['backbone'][:12]}, "
            f"but {config.model.backbone} has {now[:12]}: the frozen weights differ; name the one it had in "
            f"model.backbone"
        )
    old, new = configuration.to_dict(base), configuration.to_dict(config)
    different = [
        f"{section}.{key} was {old[section].get(key)!r}, is {value!r}"
        for section in ("modules", "hypernet", "vision")
        for key, value in new[section].items()
        if old[section].get(key) != value and key not in ("weights", "head_std")
    ]
    if different:
        raise ValueError(f"transfer.init_from: {folder} does not fit this run: {', '.join(different)}")
    missing = [name for name in base.data.tasks if name not in config.data.tasks]
    if missing:
        raise ValueError(
            f"transfer.init_from: {folder} was trained on tasks {list(base.data.tasks)}, of which this run's "
            f"{list(config.data.tasks)} leave out {missing}"
        )
    unknown = {name: source for name, source in config.transfer.like.items() if source not in base.data.tasks}
    if unknown:
        raise ValueError(f"transfer.like: {unknown} names tasks that {folder} does not have: {list(base.data.tasks)}")


@torch.no_grad()
def _fill(model: HyperPELT, state: dict[str, torch.Tensor], base_tasks: Sequence[str]) -> None:
    """Copies the other run's weights; entries of its tasks to where these tasks are now."""
    places = torch.tensor([model.tasks.index(name) for name in base_tasks])
    for name, parameter in model.named_parameters():
        if name in model.per_task:
            parameter.index_copy_(model.per_task[name], places.to(parameter.device), state[name].to(parameter))
        else:
            parameter.copy_(state[name])


@torch.no_grad()
def _copy_entry(model: HyperPELT, source: int, target: int) -> None:
    parameters = dict(model.named_parameters())
    for name, dim in model.per_task.items():
        parameters[name].select(dim, target).copy_(parameters[name].select(dim, source))


@torch.no_grad()
def _losses(
    model: HyperPELT, config: Config, manifest: Manifest, task: str, candidates: Sequence[str]
) -> dict[str, float]:
    """The mean loss on training samples of `task`, answered as each of the `candidates`.

    Samples that cannot be used are skipped; ValueError, on every rank, if that leaves none.
    """
    ranks = dist.rank(), dist.world_size()
    stream = train_stream(manifest, config, config.data.tasks, model.backbone.tokenizer, *ranks)
    reader, collator = Reader(manifest), collator_for(config, config.data.tasks, model.backbone.tokenizer)
    was_training, size = model.training, config.train.micro_batch

    samples: list[Sample] = []
    features: dict[str, np.ndarray] = {}
    for sample in stream.samples(task, SAMPLES):
        try:
            collator.rows([sample], [1.0])
            features |= reader.images([sample]) if collator.grid else {}
        except (DamagedSample, UnusableSample) as error:
            log.warning("not asked which task %s is like: %s", task, error)
        else:
            samples.append(sample)
    if not all(dist.gather(len(samples))):
        raise ValueError(f"task {task!r}: no training sample that was drawn can be used in {manifest.path}")

    def loss(chunk: list[Sample]) -> float:
        batch = collator(chunk, features, [1.0] * len(chunk))
        return float(model(batch.to(dist.device())).sample_losses.sum())

    model.eval()
    means = {}
    with model.backbone.own_pace():  # ranks may have different numbers of usable samples
        for candidate in candidates:
            asked = [sample._replace(task=candidate) for sample in samples]
            total = sum(loss(asked[i : i + size]) for i in range(0, len(asked), size))
            means[candidate] = total / len(samples)
    model.train(was_training)
    return means


def write_decisions(run_dir: Path, decided: dict[str, Any]) -> None:
    """run_dir/transfer.json: what every new task was started from, and the losses that decided it."""
    (run_dir / "transfer.json").write_text(json.dumps(decided, indent=1) + "\n")
