"""Asks a trained run: every rank answers a share of the samples and all answers are gathered.

This file must not know what the answers are for, how they are judged, nor how the model was trained.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np

from hyperpelt_ds import dist
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Batch, Sample
from hyperpelt_ds.data.evaluation import read_texts
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.data.reader import DamagedSample, Reader
from hyperpelt_ds.model import HyperPELT, Predictor, identity_of
from hyperpelt_ds.terminal import progress

Ask = Callable[[Sequence[Sample]], list[str | None]]
"""Samples to what the model generates for each, in their order; None for one whose image cannot be read."""

log = logging.getLogger(__name__)


def answers(
    samples: Sequence[Sample], ask: Ask, size: int, pace: AbstractContextManager[None] | None = None
) -> list[str | None]:
    """Every sample's answer, in order, on every rank; None where its image cannot be read.

    At most `size` samples of like length are asked at once; which, does not depend on the number of ranks. Ranks have
    different numbers of samples: `pace` is the backbone's `own_pace()`.
    """
    order = sorted(range(len(samples)), key=lambda place: len(samples[place].source))
    found: list[tuple[int, str | None]] = []
    own = range(dist.rank() * size, len(order), dist.world_size() * size)
    with pace or nullcontext():
        for start in progress(own, "batches answered", len(own)):
            places = order[start : start + size]
            found += zip(places, ask([samples[place] for place in places]), strict=True)
    gathered = dict(answer for part in dist.gather(found) for answer in part)
    return [gathered[place] for place in range(len(samples))]


def asker(run: Predictor, reader: Reader) -> Ask:
    """Asks with the image features that are stored beside the samples."""

    def ask(samples: Sequence[Sample]) -> list[str | None]:
        features: dict[str, np.ndarray] = {}
        chunk = []
        for place, sample in enumerate(samples):
            try:
                if run.collator.grid and sample.image not in features:
                    features |= reader.images([sample])
            except DamagedSample as error:
                log.warning("no answer: %s", error)
            else:
                # A key need only be unique within one task and split; in a batch it tells the samples apart. Answers
                # do not depend on the target, which may be too long to train on.
                chunk.append(sample._replace(key=str(place), target=""))
        if not chunk:
            return [None] * len(samples)
        batch = run.collator(chunk, features, [1.0] * len(chunk))
        texts = dict(zip((s.key for s in batch.samples), generate(run.model, batch, run.config), strict=True))
        return [texts.get(str(place)) for place in range(len(samples))]

    return ask


def generate(model: HyperPELT, batch: Batch, config: Config) -> list[str]:
    """One text for each sample of the batch, as the run's configuration decodes."""
    ids = model.generate(batch.to(dist.device()), config.data.max_target_length, config.eval.num_beams)
    return model.backbone.decode(ids)


def split_samples(manifest: Manifest, task: str, split: str) -> tuple[list[Sample], list[DamagedSample]]:
    """The samples of one split of one task, less those that some rank cannot read, and what is wrong with these.

    Every rank calls it and gets the same. ValueError if the task has no such split, an empty one, or one of which
    nothing can be read.
    """
    own: dict[int, DamagedSample] = {}
    read = read_texts(manifest, task, split, own)
    damaged = {number: error for part in dist.gather(own) for number, error in part.items()}
    numbers = [number for number in range(manifest.count(task, split)) if number not in own]
    samples = [sample for number, sample in zip(numbers, read, strict=True) if number not in damaged]
    errors = [damaged[number] for number in sorted(damaged)]
    if errors and not samples:
        raise ValueError(f"no sample of split {split!r} of task {task!r} can be read, the first: {errors[0]}")
    if errors:
        log.warning("%s, %s: %d samples cannot be read, the first: %s", task, split, len(errors), errors[0])
    if not samples:
        sizes = ", ".join(f"{name} ({manifest.count(task, name)})" for name in manifest.tasks[task])
        fault = f"has no samples in its split {split!r}" if split in manifest.tasks[task] else f"has no split {split!r}"
        raise ValueError(f"task {task!r} {fault} in {manifest.path}; its splits: {sizes or 'none'}")
    return samples, errors


def known_tasks(names: Sequence[str] | None, tasks_of_run: Sequence[str], run_dir: str | Path) -> Sequence[str]:
    """`names`, or all tasks of the run if None; ValueError with the nearest for a name that is none of them."""
    for name in names or ():
        if name not in tasks_of_run:
            near = difflib.get_close_matches(name, tasks_of_run, 3, 0.4) or tasks_of_run
            raise ValueError(f"task {name!r} is not one of {run_dir}; did you mean {', '.join(near)}?")
    return names or tasks_of_run


def load_manifest(path: str | Path, run: Predictor, run_dir: str | Path) -> Manifest:
    """The manifest; ValueError if its image features are not of the encoder that the run was trained with."""
    manifest = Manifest.of(run.config.data, path)
    check_features(manifest, run.config, run_dir)
    return manifest


def check_features(manifest: Manifest, config: Config, run_dir: str | Path) -> None:
    """Raises ValueError if `config` uses images and those of the manifest are not of the encoder of the run `run_dir`.

    What says nothing of an encoder fits: a manifest without features, a run that was trained without any.
    """
    made_with = identity_of(Path(run_dir))["encoder"]
    if config.vision.encoder and manifest.features and made_with not in (None, manifest.features.encoder):
        raise ValueError(
            f"{manifest.path} holds features of {manifest.features.encoder}, {run_dir} was trained on "
            f"{made_with}; make them with the run's encoder (data_prep/features.py)"
        )
