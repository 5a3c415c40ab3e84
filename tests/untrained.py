"""Runs that were never trained, and data for them: any tasks, in a second, for what is asked of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from conftest import CELLS, CHANNELS, VISION
from safetensors.torch import save_file

from hyperpelt_ds import config as configuration
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data import shards
from hyperpelt_ds.data.manifest import FeatureSet, Manifest, write_manifest
from hyperpelt_ds.model import IDENTITY, build
from hyperpelt_ds.train import loop


def save_samples(folder: Path, samples: dict[str, dict[str, list[Sample]]]) -> Path:
    """A manifest of task -> split -> samples, with random features for every image that they name."""
    written = {
        task: {split: shards.write_task(folder, task, split, own) for split, own in splits.items()}
        for task, splits in samples.items()
    }
    everything = (sample for splits in samples.values() for own in splits.values() for sample in own)
    images = sorted({sample.image for sample in everything if sample.image is not None})
    random = np.random.default_rng(1)
    features = [(image, random.normal(size=(CELLS, CHANNELS)).astype(np.float16)) for image in images]
    stored = FeatureSet(CELLS, CHANNELS, VISION, shards.write_features(folder, features)) if images else None
    return write_manifest(folder, written, stored, {})


def untrained_run(folder: Path, config: Config) -> Path:
    """A run of `config` whose weights are random, and large enough that answers differ by task, text and image."""
    manifest = Manifest.load(config.data.manifest)
    config = loop.resolve(config, manifest)
    model = build(config, config.data.tasks)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: parameter.detach() + 0.5 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
    }
    (folder / "best").mkdir(parents=True)
    save_file(weights, folder / "best/weights.safetensors")
    configuration.save(config, folder / "config.json")
    encoder = manifest.features.encoder if manifest.features else None
    identity = {"backbone": model.backbone.fingerprint(), "data": manifest.digests(manifest.tasks), "encoder": encoder}
    (folder / IDENTITY).write_text(json.dumps(identity))
    return folder
