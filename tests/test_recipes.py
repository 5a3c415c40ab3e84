"""Recipes: what their docstrings count, and that every one of them trains, is saved, loads and answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import CELLS, CHANNELS, VISION, WORDS, save_backbone
from PIL import Image
from safetensors.torch import load_file
from transformers import MarianConfig

from hyperpelt_ds import config as configs
from hyperpelt_ds import counts, model, recipes, tasks
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data import shards
from hyperpelt_ds.data.manifest import FeatureSet, write_manifest

ISSUED = {
    "demo", "glue_t5_base", "vl_t5_base", "glue_bart_base", "hyperformer_pp_t5_base", "adapters_t5_base",
    "prefix_t5_base", "mam_t5_base", "lora_t5_base",
}  # fmt: skip
TRAINED = [name for name in recipes.RECIPES if name != "demo"]  # the demo's kind of run is tests/test_train.py's
ON_TOKENS = ["hypernet.conditions=", "hypernet.parameters=shared", "vision.tokens=true", "modules.kinds=adapter"]
RUNS = {**{name: (name, []) for name in TRAINED}, "vl_adapters": ("vl_t5_base", ON_TOKENS)}


def tiny(name: str, overrides: list[str], folder: Path) -> Config:
    """The recipe with everything small that only sets a size or a place, and everything else as it is."""
    recipe = recipes.get(name)
    has_images = recipe.vision.encoder is not None
    small = {
        "model.backbone": folder / ("bart" if "bart" in recipe.model.backbone else "t5"),
        "modules.prefix_length": min(recipe.modules.prefix_length, CELLS),
        "modules.bottleneck": 3,
        "modules.lora_rank": 2,
        "hypernet.prefix_mlp": 5 if recipe.hypernet.prefix_mlp else 0,
        "hypernet.embedding_size": 8,
        "hypernet.hidden_size": 6,
        "hypernet.hyper_size": 7,
        "data.manifest": folder / ("images" if has_images else "text") / "manifest.json",
        "data.max_source_length": 16,
        "data.max_target_length": 8,
        "train.steps": 3,
        "train.global_batch": 8,
        "train.micro_batch": 4,
        "train.learning_rate": 1e-2,
        "train.warmup_steps": 0,
        "train.log_every": 1,
        "train.save_every": 3,
        "train.eval_every": 3,
        "eval.batch_size": 16,
        "eval.samples_per_task": 2,
        "eval.num_beams": min(recipe.eval.num_beams, 2),
    }
    if has_images:
        own = {**VISION, "weights": folder / "encoder.pth", "cells": CELLS, "channels": CHANNELS}
        small |= {f"vision.{key}": value for key, value in own.items()}
    return recipe.override([*(f"{field}={value}" for field, value in small.items()), *overrides])


def samples(name: str, split: str, n: int) -> list[Sample]:
    """Random words, and targets that the task allows."""
    random = np.random.default_rng(len(name))
    task = tasks.get(name)
    answers = task.labels or ("red", "a blue circle")
    return [
        Sample(
            key=f"{split}-{i}",
            task=name,
            source=" ".join(random.choice(WORDS, 5)),
            target=answers[i % len(answers)],
            item=f"{split}-{i}",
            image=f"{split}-{i % 3}" if task.modality == "vision" else None,
            references=("green", "red") * 5 if task.modality == "vision" else (),
        )
        for i in range(n)
    ]


def save_data(folder: Path, names: tuple[str, ...]) -> None:
    sizes = {"train": 8, "validation": 4}
    stored = {
        name: {split: shards.write_task(folder, name, split, samples(name, split, n)) for split, n in sizes.items()}
        for name in names
    }
    features = None
    if any(tasks.needs_image(name) for name in names):
        random = np.random.default_rng(0)
        grids = [(f"{split}-{i}", random.normal(size=(CELLS, CHANNELS))) for split in sizes for i in range(3)]
        features = FeatureSet(CELLS, CHANNELS, VISION, shards.write_features(folder, grids))
    write_manifest(folder, stored, features, {"about": "tiny"})


@pytest.fixture(scope="module")
def runs(train_many: Callable[..., None], encoder_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished two-rank run of every recipe, all trained by one start of DeepSpeed."""
    folder = tmp_path_factory.mktemp("recipes")
    for kind in ("t5", "bart"):
        save_backbone(folder / kind, kind)
    (folder / "encoder.pth").symlink_to(encoder_file)
    save_data(folder / "text", recipes.get("glue_t5_base").data.tasks)
    save_data(folder / "images", recipes.get("vl_t5_base").data.tasks)
    train_many(
        {
            name: (tiny(recipe, overrides, folder), "ds_configs/zero2_cpu.json", folder / "runs" / name)
            for name, (recipe, overrides) in RUNS.items()
        }
    )
    return folder / "runs"


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_trains_and_its_checkpoint_answers(runs, name):
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert list(losses) == [1, 2, 3] and all(map(math.isfinite, losses.values()))
    run = model.load(runs / name)
    trained = load_file(runs / name / "step_00000003" / "weights.safetensors")
    start = dict(model.build(run.config, run.config.data.tasks).named_parameters())
    assert trained.keys() == start.keys()
    still = [key for key, tensor in trained.items() if (tensor == start[key]).all()]
    assert not still, f"never trained: {still}"
    texts = ["the film is good", "a blue circle"]
    names = list(run.config.data.tasks[:2])
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    answers = run.generate(names, texts, pictures if run.config.vision.encoder else None, num_beams=2)
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_what_is_estimated_is_what_a_checkpoint_holds(runs, name):
    found = counts.estimate(configs.load(runs / name / "config.json"))
    trained = load_file(runs / name / "step_00000003" / "weights.safetensors")
    assert found.trainable == sum(tensor.numel() for tensor in trained.values())
    assert found.trainable_bytes == sum(tensor.nbytes for tensor in trained.values())
    run = model.load(runs / name)
    assert found.total == run.model.parameter_counts()["total"]


def test_the_recipes_that_were_asked_for_are_there():
    assert recipes.RECIPES.keys() >= ISSUED


@pytest.mark.parametrize("name", TRAINED)
def test_the_docstring_states_the_counted_size_and_share(name):
    said = " ".join(recipes.RECIPES[name].__doc__.split())
    found = counts.estimate(recipes.get(name))
    assert f"{found.trainable:,} trainable parameters" in said
    if recipes.get(name).vision.encoder is not None:
        assert f"{100 * found.trainable_of_total:.3f} % of all" in said
    else:
        assert f"{found.times_backbone:.3f}x of " in said and f"{100 * found.trainable_a_task:.3f} % a task" in said


def test_the_demos_docstring_states_the_counted_size(tmp_path):
    MarianConfig(
        d_model=256, encoder_layers=6, decoder_layers=2, encoder_attention_heads=8, decoder_attention_heads=8,
        encoder_ffn_dim=1536, decoder_ffn_dim=1536, vocab_size=32001, max_position_embeddings=512, pad_token_id=32000,
        decoder_start_token_id=32000,
    ).save_pretrained(tmp_path)  # fmt: skip
    found = counts.estimate(recipes.get("demo").override([f"model.backbone={tmp_path}"]), tasks=6)
    assert f"{found.trainable:,} trainable of {found.total:,} parameters" in recipes.RECIPES["demo"].__doc__
