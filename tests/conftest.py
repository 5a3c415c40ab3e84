"""Tiny real things for every test: backbones with a tokenizer, shards with a manifest, a configuration, subprocesses.

Everything is built once a session and only read by the tests; a test that changes files copies them first.
"""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two ranks on two cores; must be set before torch is imported

import hypothesis
import numpy as np
import pytest
import torch
from cluster import Cluster, why_not
from tiny import VOCABULARY, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hyperpelt_ds.config import (
    Config,
    DataConfig,
    EvalConfig,
    HypernetConfig,
    ModelConfig,
    ModulesConfig,
    TrainConfig,
    VisionConfig,
    to_dict,
)
from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data import shards
from hyperpelt_ds.data.manifest import FeatureSet, write_manifest
from hyperpelt_ds.vision import EfficientNetLite0

# The same examples in every run: a test fails for what was changed. HYPOTHESIS=explore looks for others.
if os.environ.get("HYPOTHESIS") != "explore":
    hypothesis.settings.register_profile("repeatable", derandomize=True)
    hypothesis.settings.load_profile("repeatable")


ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TEXT_TASKS = ("movie_sentiment", "movie_rating")
IMAGE_TASKS = ("easy_vqa", "shape_caption")
CELLS, CHANNELS = 4, 16
VISION = {"encoder": "efficientnet_lite0", "image_size": 4, "stage": "block1"}  # gives 2 x 2 cells of 16 channels

WORDS = re.findall(
    r"\w+",
    "a the film is was not very good bad dull funny moving story what color shape does image contain there red blue "
    "green circle rectangle triangle yes no positive negative poor great mixed weak fair terrible excellent one two",
)
SHAPES = [(color, shape) for color in ("red", "blue", "green") for shape in ("circle", "rectangle", "triangle")]


def save_backbone(folder: Path, kind: str) -> Path:
    """A tiny random model of `kind` (see tiny.KINDS) and a whole-word tokenizer that ends texts with `</s>`."""
    model = tiny_model(kind, dropout=0.1)
    special = {model.config.pad_token_id: "<pad>", model.config.eos_token_id: "</s>"}
    places = [special.get(i, f"<{i}>") for i in range(3)]
    vocabulary = {word: i for i, word in enumerate([*places, "<unk>", *WORDS])}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", model.config.eos_token_id)]
    )
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(folder)
    return folder


def tiny_samples(split: str, n: int) -> dict[str, list[Sample]]:
    """Two text tasks on the same sentences and two image tasks on the same images, `n` samples each."""
    random = np.random.default_rng(["train", "validation", "test"].index(split))
    samples: dict[str, list[Sample]] = {task: [] for task in TEXT_TASKS + IMAGE_TASKS}
    for i in range(n):
        good = bool(random.integers(2))
        sentence = " ".join(random.choice(WORDS[:6], random.integers(3, 8))) + (" good funny" if good else " bad dull")
        image = f"{split}-{i % (n // 2)}"
        color, shape = SHAPES[(i % (n // 2)) % len(SHAPES)]
        for task, source, target, picture, group in (
            ("movie_sentiment", sentence, "positive" if good else "negative", None, None),
            ("movie_rating", sentence, "great" if good else "poor", None, None),
            ("easy_vqa", f"what {'color' if i % 2 else 'shape'} is the shape", color if i % 2 else shape, image,
             "color" if i % 2 else "shape"),
            ("shape_caption", "what does the image contain", f"a {color} {shape}", image, None),
        ):  # fmt: skip
            item = image if picture else f"{split}-{i}"
            samples[task].append(Sample(f"{split}-{i}", task, source, target, item, picture, group))
    return samples


def save_manifest(folder: Path, train: int = 48, held_out: int = 12) -> Path:
    """Shards of `tiny_samples` and of image features that tell shapes apart; several shards a split."""
    sizes = {"train": train, "validation": held_out, "test": held_out}
    splits = {split: tiny_samples(split, n) for split, n in sizes.items()}
    tasks = {
        task: {split: shards.write_task(folder, task, split, splits[split][task], per_shard=20) for split in sizes}
        for task in TEXT_TASKS + IMAGE_TASKS
    }
    grids = np.random.default_rng(7).normal(size=(len(SHAPES), CELLS, CHANNELS))
    features = [
        (f"{split}-{i}", grids[i % len(SHAPES)].astype(np.float16)) for split, n in sizes.items() for i in range(n // 2)
    ]
    stored = FeatureSet(CELLS, CHANNELS, VISION, shards.write_features(folder, features, 16))
    return write_manifest(folder, tasks, stored, {"about": "tiny"})


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Marian with its tokenizer."""
    return save_backbone(tmp_path_factory.mktemp("backbone"), "marian")


@pytest.fixture(scope="session")
def manifest_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two text tasks and two image tasks, 48 training and 12 held-out samples each."""
    return save_manifest(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def encoder_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a random image encoder."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("vision") / "random.pth"
    torch.save(EfficientNetLite0().state_dict(), file)
    return file


@pytest.fixture(scope="session")
def config(backbone_folder: Path, manifest_path: Path, encoder_file: Path) -> Config:
    """A run of a few seconds over all four tasks: 9 steps of 8 samples, checkpoints at 3, 6 and 9, dropout off."""
    return Config(
        model=ModelConfig(backbone=str(backbone_folder), dropout=0.0),
        modules=ModulesConfig(prefix_length=3, bottleneck=4, lora_rank=2),
        hypernet=HypernetConfig(embedding_size=8, hidden_size=16, hyper_size=8),
        vision=VisionConfig(**VISION, weights=str(encoder_file), cells=CELLS, channels=CHANNELS),
        data=DataConfig(manifest=str(manifest_path), max_source_length=16, max_target_length=8),
        train=TrainConfig(
            steps=9,
            global_batch=8,
            micro_batch=2,
            learning_rate=1e-2,
            warmup_steps=2,
            weight_decay=0.01,
            log_every=1,
            save_every=3,
            eval_every=3,
        ),
        eval=EvalConfig(batch_size=8, samples_per_task=4),
    )


def overrides(config: Config) -> list[str]:
    """The assignments that turn any recipe into `config`."""
    tree = to_dict(config)
    del tree["recipe"]
    return [f"{section}.{key}={json.dumps(value)}" for section in tree for key, value in tree[section].items()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command of this environment, in the repository's root unless told otherwise.

    The first word is a script beside the interpreter ("deepspeed", "torchrun"), or "python".
    """

    def run(*command: object, timeout: float = 240, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable) if command[0] == "python" else Path(sys.executable).parent / str(command[0])
        return subprocess.run(
            [str(program), *map(str, command[1:])], cwd=cwd, capture_output=True, text=True, timeout=timeout
        )

    return run


@pytest.fixture(scope="session")
def train_on_two_ranks(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., None]:
    """Runs launch/train.py under the DeepSpeed launcher: `train_on_two_ranks(config, zero_stage, run_dir, *flags)`."""

    def train(config: Config, stage: int, run_dir: Path, *flags: str) -> None:
        port = free_port()
        done = run_python(
            *("deepspeed", "--master_port", port, "--num_accelerators", 2, "launch/train.py"),
            *("--recipe", "demo", "--ds_config", f"ds_configs/zero{stage}_cpu.json", "--run_dir", run_dir),
            *(*flags, *overrides(config)),
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        left = list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
        assert not left, f"DeepSpeed's buffers fill the memory run by run: {left}"

    return train


@pytest.fixture(scope="session")
def train_many(
    run_python: Callable[..., subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., None]:
    """Trains {name: (config, DeepSpeed JSON, run_dir)} in order, in one group of two ranks."""

    def train(jobs: dict[str, tuple[Config, str, Path]], resume: bool = False) -> None:
        file = tmp_path_factory.mktemp("jobs") / "jobs.json"
        lines = [
            {"config": to_dict(c), "ds_config": str(d), "run_dir": str(r), "resume": resume}
            for c, d, r in jobs.values()
        ]
        file.write_text(json.dumps(lines))
        done = run_python(
            *("deepspeed", "--master_port", free_port(), "--num_accelerators", 2, "tests/train_many.py", file),
            timeout=900,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    return train


@pytest.fixture(scope="session")
def with_dropout(config: Config) -> Config:
    return config.override(["model.dropout=0.1"])


@pytest.fixture(scope="session")
def finished_run(
    train_on_two_ranks: Callable[..., None], with_dropout: Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """The folder of a finished two-rank run of `with_dropout` at a ZeRO stage; trained once, only to be read."""

    @functools.cache
    def run(stage: int) -> Path:
        run_dir = tmp_path_factory.mktemp(f"zero{stage}") / "run"
        train_on_two_ranks(with_dropout, stage, run_dir)
        return run_dir

    return run


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster"), nodes=2) as nodes:
        yield nodes


@pytest.fixture
def typed(cluster: Cluster, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a command on a node from a folder that has the example as its .deepspeed_env."""
    (tmp_path / ".deepspeed_env").write_bytes((ROOT / "launch" / "deepspeed_env.example").read_bytes())
    environment = {"PYTHONPATH": str(ROOT), "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin"}

    def start(node: str, *command: object, **more: str) -> subprocess.Popen[str]:
        return cluster.start(node, *command, cwd=tmp_path, env={**environment, **more})

    return start
