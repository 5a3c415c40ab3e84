"""A training run from configuration to last checkpoint: what is put together and compared before the first step.

It must not know DeepSpeed, files inside a checkpoint, or when something is due.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hyperpelt_ds import config as configuration
from hyperpelt_ds import dist, tasks
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import VALIDATION
from hyperpelt_ds.data.check import check_samples
from hyperpelt_ds.data.collate import collator_for
from hyperpelt_ds.data.loader import TrainStream
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.data.plain import PlainStream, train_stream
from hyperpelt_ds.model import IDENTITY, HyperPELT, build, description_sample, identity_of
from hyperpelt_ds.train import (
    agreement,
    checkpoint,
    crash,
    deepspeed_json,
    engine,
    outcome,
    randomness,
    steps,
    supervision,
    traffic,
    transfer,
)
from hyperpelt_ds.train.checkpoint import Progress, Saver
from hyperpelt_ds.train.control import RollBack
from hyperpelt_ds.train.engine import Engine
from hyperpelt_ds.train.watchdog import START, Watchdog

log = dist.logger(__name__)


class Ready(NamedTuple):
    """All that is there before the first step; `decided` is what was chosen for new tasks, if this run begins some, and
    `sent` the bytes that a rank will send in a step, where a formula says it."""

    config: Config
    manifest: Manifest
    model: HyperPELT
    engine: Engine
    backbone: str
    decided: dict[str, Any] | None
    sent: float | None


def train(config: Config, ds_config: str | Path, run_dir: str | Path, resume: bool = False) -> HyperPELT:
    """Trains `config` in `run_dir`, from the newest valid checkpoint there if `resume`; returns the model as it ended.

    Works in one process and under a launcher; every rank calls it. Raises ValueError for whatever does not fit, before
    the first step, and outcome.Stopped if the ranks leave together before the last one.
    """
    folder = Path(run_dir)
    claim(folder, resume)
    outcome.begin(folder)
    with Watchdog(folder, config.train) as watchdog:
        if dist.local_rank() == 0 and not torch.distributed.is_initialized():
            supervision.take_over(folder, log.warning)
        return _train(prepare(config, Path(ds_config), folder), folder, watchdog)


def prepare(config: Config, ds_config: Path, folder: Path) -> Ready:
    """Joins the ranks, reads, builds and compares; writes nothing. The weights are those of a run that begins."""
    if config.transfer.init_from and (Path(config.transfer.init_from) / IDENTITY).is_file():
        tasks.adopt(identity_of(Path(config.transfer.init_from)).get("records", {}))  # which other data may not have
    manifest = Manifest.of(config.data)
    config = resolve(config, manifest)
    settings = deepspeed_json.merge(ds_config, config, dist.world_size())  # for its errors, before minutes of loading
    engine.start_distributed()
    agreement.check_versions()
    dist.agree("the data", manifest.digest)
    model = build(config, config.data.tasks).to_device(dist.device())
    if model.backbone.overflows_in_float16 and deepspeed_json.computes_in_float16(settings):
        log.warning(
            "%s asks for float16, whose range the activations of published T5 models leave: expect NaN, use bfloat16",
            ds_config,
        )
    if config.train.warmup_steps >= config.train.steps:
        log.warning(
            "train.warmup_steps %d: the learning rate never reaches train.learning_rate in train.steps %d",
            *(config.train.warmup_steps, config.train.steps),
        )
    backbone = model.backbone.fingerprint()
    dist.agree("the frozen backbone", backbone)
    _check_samples(manifest, config, model)
    decided = None
    if config.transfer.init_from and checkpoint.newest(folder) is None:
        decided = transfer.start(model, config, manifest)
    transfer.freeze(model, config)
    sent = traffic.of_run(model, config, settings, dist.world_size(), torch.distributed.get_backend())
    wrapped = engine.start(model, config, ds_config)
    randomness.seed(config.train.seed, dist.rank())  # each rank its own dropout
    return Ready(config, manifest, model, wrapped, backbone, decided, sent.total if sent else None)


def _train(ready: Ready, folder: Path, watchdog: Watchdog) -> HyperPELT:
    config, manifest, model, wrapped, backbone, decided, sent = ready
    saved = _resume(folder, wrapped, config, backbone)
    run = steps.Run(
        config,
        folder,
        manifest,
        model,
        wrapped,
        stream(ready, saved),
        Saver(folder, config, backbone),
        watchdog,
        wrapped.monitor,
        sent,
    )
    agreement.check_shared(folder)
    supervision.record_process(folder, dist.rank())
    if dist.rank() == 0:
        (folder / outcome.START).unlink(missing_ok=True)  # all have read it, and it is no other start's
        supervision.forget_processes(folder, dist.world_size())
        (folder / outcome.DONE).unlink(missing_ok=True)
        identity = {
            "backbone": backbone,
            "data": manifest.digests(config.data.tasks),
            "encoder": _encoder(manifest, folder, config),
            "descriptions": description_sample(model),
            "records": tasks.own_records(config.data.tasks),
        }
        configuration.save(config, folder / "config.json")
        (folder / IDENTITY).write_text(json.dumps(identity, indent=1) + "\n")
        if decided is not None:
            transfer.write_decisions(folder, decided)
        (folder / "environment.json").write_text(json.dumps(_environment(), indent=1) + "\n")

    def finish() -> None:
        if config.transfer.train == "embeddings" and dist.rank() == 0:
            for file in transfer.write_task_files(folder, model, config):
                log.info("%s: %d bytes, to be added to %s", file, file.stat().st_size, config.transfer.init_from)

    try:
        steps.take(run, saved or Progress(0, run.stream.state()), finish)
    except RollBack:  # at most once in a run
        watchdog.enter(START)
        saved = _resume(folder, wrapped, config, backbone)
        assert saved is not None
        again = dataclasses.replace(run, stream=stream(ready, saved), saver=Saver(folder, config, backbone))
        steps.take(again, saved, finish)
    return model


def stream(ready: Ready, saved: Progress | None) -> TrainStream | PlainStream:
    """The training data from where `saved` stands, or from the beginning."""
    ranks, state = (dist.rank(), dist.world_size()), saved.stream if saved else None
    names, tokenizer = ready.config.data.tasks, ready.model.backbone.tokenizer
    return train_stream(ready.manifest, ready.config, names, tokenizer, *ranks, state)


def resolve(config: Config, manifest: Manifest) -> Config:
    """The configuration with its task list spelt out; raises ValueError for a task that cannot be trained here."""
    names = config.data.tasks or tuple(manifest.tasks)
    unknown = [name for name in config.data.train_tasks if name not in names]
    if unknown:
        raise ValueError(f"data.train_tasks: {unknown[0]!r} is not one of the run's tasks, {', '.join(names)}")
    trained, plain = config.data.train_tasks or names, config.data.plain
    if plain and set(plain) != set(trained):
        raise ValueError(f"data.plain names {', '.join(plain)}, but the tasks to be trained are {', '.join(trained)}")
    for name in trained:
        if not manifest.count(name, "train") and not plain:
            raise ValueError(
                f"task {name!r} has no samples in the train split of {config.data.manifest}; leave it out of "
                f"data.tasks (or of data.train_tasks), or build them"
            )
        if tasks.needs_image(name) and config.vision.encoder is None:
            raise ValueError(
                f"task {name!r} needs images, but vision.encoder is not set; set it, as data_prep/features.py "
                f"says at its end, or leave the task out of data.tasks"
            )
    for name in config.data.loss_weights:
        if name not in names:
            raise ValueError(f"data.loss_weights: {name!r} is not one of the run's tasks, {', '.join(names)}")
    if not any(manifest.count(name, VALIDATION) for name in trained):
        raise ValueError(
            f"no task of the run has samples in the {VALIDATION} split of {config.data.manifest}, by which the best "
            f"weights are chosen; build some"
        )
    data, model, vision, hypernet = config.data, config.model, config.vision, config.hypernet
    return dataclasses.replace(  # local paths in full, so that the run can be loaded from anywhere
        config,
        data=dataclasses.replace(data, tasks=names, manifest=_absolute(data.manifest)),
        model=dataclasses.replace(model, backbone=_absolute(model.backbone)),
        vision=dataclasses.replace(vision, weights=vision.weights and _absolute(vision.weights)),
        hypernet=dataclasses.replace(
            hypernet, sentence_encoder=hypernet.sentence_encoder and _absolute(hypernet.sentence_encoder)
        ),
    )


def _absolute(place: str) -> str:
    """A local path in full, by the names that it was given, which are those of every node; a hub id as it is."""
    return os.path.abspath(place) if Path(place).exists() else place


def _encoder(manifest: Manifest, folder: Path, config: Config) -> dict[str, object] | None:
    """What made the features that the run's weights know: its own data's, or else those of the run it started from."""
    if manifest.features:
        return manifest.features.encoder
    if (folder / IDENTITY).is_file():
        return identity_of(folder)["encoder"]
    return identity_of(Path(config.transfer.init_from))["encoder"] if config.transfer.init_from else None


def _resume(folder: Path, wrapped: Engine, config: Config, backbone: str) -> Progress | None:
    """Brings everything but the data back to the newest valid checkpoint; None if there is none to go back to."""
    found = checkpoint.newest(folder)
    if found is None:
        return None
    checkpoint.check(found, config, backbone, dist.world_size(), wrapped.stage, wrapped.precision)
    log.info("resuming from %s", found)
    return checkpoint.load(found, wrapped, config.train.seed)


def _check_samples(manifest: Manifest, config: Config, model: HyperPELT) -> None:
    """Every rank reads its share; what one finds wrong, all raise."""
    collator = collator_for(config, config.data.tasks, model.backbone.tokenizer)
    fault = None
    try:
        check_samples(manifest, config.trained_tasks, collator, dist.rank(), dist.world_size())
    except ValueError as error:
        fault = str(error)
    faults = [text for text in dist.gather(fault) if text is not None]
    if faults:
        raise ValueError(faults[0])


def claim(folder: Path, resume: bool) -> None:
    """Raises ValueError if another run is in the folder. What a start left that got nowhere is none."""
    used = folder.is_dir() and not all(crash.left(file) for file in folder.iterdir())
    if used and not resume:
        raise ValueError(f"run_dir {folder} is not empty; give --resume to continue it, or another run_dir")


def _environment() -> dict[str, object]:
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in agreement.PACKAGES},
        "world_size": dist.world_size(),
        "device": torch.cuda.get_device_name() if dist.has_gpu() else platform.processor() or "cpu",
        "threads": os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()),
    }
