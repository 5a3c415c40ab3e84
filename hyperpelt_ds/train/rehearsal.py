"""A dry run: data, model and launcher as in a training, two steps, the largest micro-batch that fits, one screen.

Nothing is written. It must not know DeepSpeed, how memory is measured, or what a training prepares.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hyperpelt_ds import dist, tasks
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import TRAIN, Batch, Sample
from hyperpelt_ds.data.collate import Row, collator_for
from hyperpelt_ds.train import fitting, loop, steps
from hyperpelt_ds.train.fitting import Fit
from hyperpelt_ds.train.loop import Ready
from hyperpelt_ds.train.metrics import Window
from hyperpelt_ds.train.watchdog import Watchdog

STEPS = 2


class Taken(NamedTuple):
    """One step: whether it was applied, its figures as a training would log them, and seconds."""

    applied: bool
    values: dict[str, float]
    seconds: float


def rehearse(config: Config, ds_config: str | Path, run_dir: str | Path, resume: bool = False) -> str:
    """Says what a training with these arguments would meet. Every rank calls it; only rank 0 gets the text.

    Raises ValueError for whatever `loop.train` refuses before its first step.
    """
    folder = Path(run_dir)
    loop.claim(folder, resume)
    with Watchdog(folder, config.train):
        ready = loop.prepare(config, Path(ds_config), folder)
        stream, window = loop.stream(ready, None), Window(ready.config.data.tasks, dist.device())
        ready.model.train()
        taken: list[Taken] = []
        with closing(iter(stream)) as batches, contextlib.suppress(torch.OutOfMemoryError):  # what fits is found below
            taken += [_step(ready, window, batches) for _ in range(STEPS)]
        if not all(dist.gather(bool(taken))):
            taken = []
        truncated = sum(dist.gather(stream.truncated))
        screen = _screen(ready, ds_config, taken, truncated, _fit(ready))
    return "".join(f"{line}\n" for line in screen) if dist.rank() == 0 else ""


def _step(ready: Ready, window: Window, batches: Iterator[list[Batch]]) -> Taken:
    start = time.monotonic()
    micro_batches = next(batches)
    [usable] = dist.host_sum([sum(int((batch.loss_weights > 0).sum()) for batch in micro_batches)])
    if not usable:
        raise ValueError(f"no sample of the first {STEPS} steps can be used; data_prep/verify.py says why")
    steps.accumulate(ready.engine, window, micro_batches, usable)
    applied = ready.engine.step()
    window.keep()
    return Taken(applied, window.read(), time.monotonic() - start)


def _fit(ready: Ready) -> Fit:
    config, engine = ready.config, ready.engine

    def attempt(samples: int) -> None:
        batch = longest(ready, samples).to(dist.device())
        engine.backward(engine.forward(batch, last=False).loss)

    share = _share(config)
    return fitting.largest_micro_batch(attempt, share, share // engine.accumulation, _worst(config))


def _worst(config: Config) -> Callable[[int, int], int]:
    """The most samples of a micro-batch: with train.micro_tokens no more than its budget says."""
    return (lambda samples, share: samples) if config.train.micro_tokens else fitting.most


def _share(config: Config) -> int:
    """This process's samples of a step."""
    return config.train.global_batch // dist.world_size()


def longest(ready: Ready, samples: int) -> Batch:
    """A micro-batch as large as one of so many samples can be: all lengths at their limits, every image another."""
    config = ready.config
    collator = collator_for(config, config.data.tasks, ready.model.backbone.tokenizer)
    seeing = [name for name in config.trained_tasks if collator.grid and tasks.needs_image(name)]
    names = itertools.islice(itertools.cycle(seeing or config.trained_tasks), samples)
    data, token = config.data, collator.tokenizer.eos_token_id
    rows = [
        Row(
            Sample(str(number), name, "", "", image=str(number) if seeing else None),
            [token] * data.max_source_length,
            [token] * data.max_target_length,
            1.0 / samples,
        )
        for number, name in enumerate(names)
    ]
    grid = np.zeros(collator.grid or (0, 0), dtype=np.float32)
    return collator.batch(rows, {str(number): grid for number in range(samples)})


def _screen(ready: Ready, ds_config: str | Path, taken: Sequence[Taken], truncated: int, fit: Fit) -> list[str]:
    config, engine, counts = ready.config, ready.engine, ready.model.parameter_counts()
    data, train, names = config.data, config.train, config.trained_tasks
    samples = f"{sum(ready.manifest.count(name, TRAIN) for name in names):,} training samples"
    cut = f"{truncated} of {STEPS * train.global_batch} sources cut at data.max_source_length {data.max_source_length}"
    share = counts["trainable"] / counts["total"]
    losses = ", ".join(f"{_loss(step)} in {step.seconds:.1f} s" for step in taken)
    steps_taken = (
        [
            f"{STEPS} steps      loss {losses}; {train.steps:,} like the last would take "
            f"{_span(taken[-1].seconds * train.steps)}",
            f"memory       {taken[-1].values['perf/memory_gib']:.2f} GiB at most in a process, in these steps",
        ]
        if taken
        else [f"{STEPS} steps      not taken: train.micro_batch {train.micro_batch} would not fit"]
    )
    return [
        "dry run: nothing was written",
        f"data         {data.manifest}",
        f"             {len(names)} tasks, {'plain shards' if data.plain else samples}; {cut}",
        f"model        {config.model.backbone} in {config.model.dtype}",
        f"             {counts['trainable']:,} trainable of {counts['total']:,} parameters, {share:.2%}",
        f"DeepSpeed    {ds_config}: ZeRO {engine.stage}, {engine.computes_in}, {dist.world_size()} x "
        f"{dist.device().type}, {engine.accumulation} micro-batches of {_share(config) // engine.accumulation} a step "
        "on each",
        *steps_taken,
        *_advice(config, fit),
        _next(config, fit),
    ]


def _loss(step: Taken) -> str:
    return f"{step.values['train/loss']:.4f}" if step.applied else "not finite (no weight changed)"


def _span(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes else f"{seconds:.0f} s"


def _advice(config: Config, fit: Fit) -> list[str]:
    """The largest micro-batch, and how it was found."""
    lengths = f"of the longest length, {config.data.max_source_length} + {config.data.max_target_length} tokens,"
    fits = f"{fit.largest} samples {lengths} fit" if fit.largest else f"not even 1 sample {lengths} fits"
    worst = _worst(config)(fit.largest, _share(config)) if fit.largest else 0
    if worst > fit.largest:
        fits += f" (in a step with few short texts {worst} of them may come together)"
    tried = ", ".join(f"{size} took {peak / 2**30:.2f} GiB" for size, peak in fit.peaks.items())
    line = "" if fit.largest in fit.peaks else ", and a straight line through them"
    room = f"{fit.budget / 2**30:.2f} GiB, which leaves {fitting.MARGIN:.0%} of the memory alone"
    return [
        f"micro-batch  {fits} a process, whose {_share(config)} of train.global_batch it divides",
        f"             found by going forward and backward ({tried}){line};",
        f"             a process may have {room}",
    ]


def _next(config: Config, fit: Fit) -> str:
    """The command without --dry_run; with another micro-batch if that is the largest that fits."""
    if not fit.largest:
        return "next: shorter texts (data.max_source_length), a smaller model, or more memory; then --dry_run again"
    own = [word for word in sys.argv if not word.startswith(("--dry_run", "--dry-run", "--local_rank"))]
    train, change = config.train, []
    if train.micro_tokens:
        change = [f"train.micro_tokens={fit.largest * (config.data.max_source_length + config.data.max_target_length)}"]
    elif fit.largest != min(train.micro_batch, _share(config)):
        change = [f"train.micro_batch={fit.largest}"]
    command = f"next: {shlex.join([*_launcher(), *own, *change])}"
    note = "\n      (micro-batches are parts of a step: its gradient stays the same but for rounding and dropout)"
    return command + (note if change else "")


def _launcher() -> list[str]:
    world, here = dist.world_size(), os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))
    if world == 1:
        return ["python"]
    if world != int(here):
        return ["..."]  # several nodes: as this run was started
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun", "--nproc_per_node", here]
    return ["deepspeed", "--num_accelerators", here]
