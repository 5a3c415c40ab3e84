"""A training run from configuration to last checkpoint, in the order in which things happen.

The only place that knows about steps. It must not know DeepSpeed, files inside a checkpoint, or what a task asks.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

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
from hyperpelt_ds.train import checkpoint, engine, evaluate, randomness, transfer
from hyperpelt_ds.train.checkpoint import Progress, Saver
from hyperpelt_ds.train.engine import Engine
from hyperpelt_ds.train.ledger import Ledger
from hyperpelt_ds.train.metrics import Window, Writer

log = dist.logger(__name__)


@dataclass(frozen=True)
class Run:
    """All that the steps need, put together once by `train`."""

    config: Config
    folder: Path
    manifest: Manifest
    model: HyperPELT
    engine: Engine
    stream: TrainStream | PlainStream
    saver: Saver


def train(config: Config, ds_config: str | Path, run_dir: str | Path, resume: bool = False) -> HyperPELT:
    """Trains `config` in `run_dir`, from the newest valid checkpoint there if `resume`; returns the model as it ended.

    Works in one process and under a launcher; every rank calls it. Raises ValueError for whatever does not fit, before
    the first step.
    """
    folder = Path(run_dir)
    _claim(folder, resume)
    manifest = Manifest.of(config.data)
    config = resolve(config, manifest)
    settings = engine.merge(ds_config, config, dist.world_size())  # for its errors, before minutes of loading
    engine.start_distributed()
    dist.agree("the data", manifest.digest)
    model = build(config, config.data.tasks).to_device(dist.device())
    if model.backbone.overflows_in_float16 and engine.computes_in_float16(settings):
        log.warning(
            "%s asks for float16, whose range the activations of published T5 models leave: expect NaN, use bfloat16",
            ds_config,
        )
    backbone = model.backbone.fingerprint()
    dist.agree("the frozen backbone", backbone)
    _check_samples(manifest, config, model)
    decided = None
    if config.transfer.init_from and checkpoint.newest(folder) is None:
        decided = transfer.start(model, config, manifest)
    transfer.freeze(model, config)
    wrapped = engine.start(model, config, ds_config)
    randomness.seed(config.train.seed, dist.rank())  # each rank its own dropout
    saved = _resume(folder, wrapped, config, backbone)
    stream = train_stream(
        manifest,
        config,
        config.data.tasks,
        model.backbone.tokenizer,
        dist.rank(),
        dist.world_size(),
        saved.stream if saved else None,
    )
    progress = saved or Progress(0, stream.state())
    if dist.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        configuration.save(config, folder / "config.json")
        identity = {
            "backbone": backbone,
            "data": manifest.digests(config.data.tasks),
            "encoder": _encoder(manifest, folder, config),
            "descriptions": description_sample(model),
            "records": tasks.own_records(config.data.tasks),
        }
        (folder / IDENTITY).write_text(json.dumps(identity, indent=1) + "\n")
        if decided is not None:
            transfer.write_decisions(folder, decided)
        (folder / "environment.json").write_text(json.dumps(_environment(), indent=1) + "\n")
    _steps(Run(config, folder, manifest, model, wrapped, stream, Saver(folder, config, backbone)), progress)
    if config.transfer.train == "embeddings" and dist.rank() == 0:
        for file in transfer.write_task_files(folder, model, config):
            log.info("%s: %d bytes, to be added to %s", file, file.stat().st_size, config.transfer.init_from)
    return model


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
            raise ValueError(f"task {name!r} has no samples in the train split of {config.data.manifest}")
        if tasks.needs_image(name) and config.vision.encoder is None:
            raise ValueError(f"task {name!r} needs images, but vision.encoder is not set")
    for name in config.data.loss_weights:
        if name not in names:
            raise ValueError(f"data.loss_weights: {name!r} is not one of the run's tasks, {', '.join(names)}")
    if not any(manifest.count(name, VALIDATION) for name in trained):
        raise ValueError(f"no task of the run has samples in the {VALIDATION} split of {config.data.manifest}")
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
    """A local path in full; a hub id as it is."""
    return str(Path(place).resolve()) if Path(place).exists() else place


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


def _steps(run: Run, progress: Progress) -> None:
    train = run.config.train
    counts = run.model.parameter_counts()
    log.info(
        f"{run.folder}: {len(run.config.data.tasks)} tasks, {counts['trainable']:,} trainable of {counts['total']:,} "
        f"parameters, ZeRO {run.engine.stage} on {dist.world_size()} x {dist.device()}, "
        f"step {progress.step} of {train.steps}"
    )
    writer = Writer(run.folder, progress.step)
    ledger = Ledger(run.folder, progress.step, run.config.data)
    window = Window(run.config.data.tasks, dist.device())
    batches = iter(run.stream)
    clock = _Clock(progress.step, train.steps, progress.seconds)
    run.model.train()
    for step in range(progress.step + 1, train.steps + 1):
        if _exhausted(progress, train.patience):
            break
        with window.waiting():
            micro_batches = next(batches)
        learning_rate = run.engine.learning_rate()
        # The loss is the mean over the usable samples of the global batch: how many there are is known only now, and
        # DeepSpeed divides by the micro-batches and the ranks.
        usable = dist.total(sum(int((batch.loss_weights > 0).sum()) for batch in micro_batches))
        scale = run.engine.accumulation * dist.world_size() / usable.clamp(min=1)
        for number, micro_batch in enumerate(micro_batches, 1):
            batch = micro_batch.to(dist.device())
            batch = batch._replace(loss_weights=batch.loss_weights * scale)
            output = run.engine.forward(batch, last=number == len(micro_batches))
            run.engine.backward(output.loss)
            window.add(batch, output.sample_losses)
        # All gradients are there and no weight has changed: here the ranks can still agree to skip, stop or roll back.
        if not run.engine.step():
            log.warning("step %d: the gradient is not finite, no weight was changed", step)
        ledger.write(step, run.stream.commit())
        progress = dataclasses.replace(progress, step=step, stream=run.stream.state(), seconds=clock.seconds())

        last = step == train.steps
        if step % train.log_every == 0 or last:
            values = window.read()
            values["data/truncated"] = sum(dist.gather(run.stream.truncated))
            values["data/holes"] = ledger.count(progress.stream.samples)
            values["train/learning_rate"] = learning_rate
            values["train/gradient_norm"] = run.engine.gradient_norm()
            writer.write(step, values)
            log.info("%s", clock.line(step, values, run.folder))
            if not math.isfinite(values["train/loss"]):
                raise FloatingPointError(f"the loss is {values['train/loss']} at step {step}; {run.folder} is stopped")
        with window.paused():
            if step % train.eval_every == 0 or last:
                progress = _validate(run, progress, writer)
            if step % train.save_every == 0 or last or _exhausted(progress, train.patience):
                run.saver.save(run.engine, progress)
    run.saver.close()
    writer.close()
    log.info("%s: finished at step %d, best validation score %s", run.folder, progress.step, progress.best_score)


def _validate(run: Run, progress: Progress, writer: Writer) -> Progress:
    """Scores the validation split; keeps the weights if the mean over tasks is the best so far."""
    run.model.eval()
    limit = run.config.eval.samples_per_task
    scores = evaluate.validate(run.model, run.manifest, run.config, VALIDATION, limit)
    run.model.train()
    mean = evaluate.mean_score(scores)
    flat = {f"eval/{task}/{metric}": value for task, table in scores.items() for metric, value in table.items()}
    writer.write(progress.step, {**flat, "eval/mean": mean})
    figures = "  ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in flat.items())
    log.info("validation at step %d: mean %.4f  %s", progress.step, mean, figures)
    if any(run.manifest.count(name, VALIDATION) for name in run.config.trained_tasks if name not in scores):
        # The mean is over other tasks than the best's. Without a best, these weights are better than none.
        if progress.best_score is None:
            run.saver.save_best(run.engine, progress.step, mean, scores)
        return progress
    if progress.best_score is not None and mean <= progress.best_score:
        return dataclasses.replace(progress, stale=progress.stale + 1)
    if not run.saver.save_best(run.engine, progress.step, mean, scores):
        return progress
    return dataclasses.replace(progress, best_score=mean, stale=0)


def _exhausted(progress: Progress, patience: int) -> bool:
    return bool(patience) and progress.stale >= patience


class _Clock:
    """Progress lines with an ETA from the pace since this process began, `before` seconds after the run did."""

    def __init__(self, done: int, steps: int, before: float):
        self.start, self.done, self.steps, self.before = time.monotonic(), done, steps, before

    def seconds(self) -> float:
        """What the run took so far, over all its processes."""
        return self.before + time.monotonic() - self.start

    def line(self, step: int, values: dict[str, float], folder: Path) -> str:
        seconds = (time.monotonic() - self.start) / (step - self.done) * (self.steps - step)
        return (
            f"step {step}/{self.steps}  loss {values['train/loss']:.4f}  "
            f"{values['perf/samples_per_second']:.1f} samples/s  ETA {seconds // 60:.0f}:{seconds % 60:02.0f}  "
            f"lr {values['train/learning_rate']:.2e}  {folder}"
        )


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


def _claim(folder: Path, resume: bool) -> None:
    used = folder.is_dir() and any(folder.iterdir())
    if used and not resume:
        raise ValueError(f"run_dir {folder} is not empty; give --resume to continue it, or another run_dir")


def _environment() -> dict[str, object]:
    packages = ("hyperpelt-ds", "torch", "deepspeed", "transformers", "webdataset", "numpy", "safetensors")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in packages},
        "world_size": dist.world_size(),
        "device": torch.cuda.get_device_name() if dist.has_gpu() else platform.processor() or "cpu",
        "threads": os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()),
    }
