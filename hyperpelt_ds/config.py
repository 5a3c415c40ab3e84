"""The configuration of a run: frozen dataclasses, checked by type and range, to and from JSON.

The recipe owns what is here. Precision, ZeRO, buckets and offload belong to the DeepSpeed JSON and are not here.
fire passes whatever it parsed, so all checking of names and types happens in this file.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class ModelConfig:
    """The frozen backbone."""

    backbone: str = ""
    """A local folder or a hub id of a BART, Marian, T5 or mT5 model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the frozen weights, and of the activations except where the DeepSpeed JSON asks for autocast while
    training; validation and generation run without autocast."""
    dropout: float | None = None
    """Dropout inside the backbone while training; None keeps the model's own rates."""
    activation_checkpointing: bool = False
    """Recompute the backbone's layers in the backward pass (non-reentrant)."""


@dataclass(frozen=True)
class HypernetConfig:
    """The hypernetwork; sizes as in section 3 of the paper."""

    modules: tuple[Literal["prefix", "adapter"], ...] = ("prefix", "adapter")
    """What is generated. ("prefix",) is HyperPrefix, both are HyperPELT."""
    prefix_length: int = 49
    """Rows of the task prefix (P), and rows of the task, layer and block embeddings."""
    embedding_size: int = 64
    hidden_size: int = 128
    hyper_size: int = 64
    """Size of the hyper-embedding (E)."""
    projector_norm: bool = True
    """Layer norm on the hyper-embedding, as HyperFormer has."""
    bottleneck: int = 16
    """Bottleneck of the generated adapters (R)."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    head_std: float = 0.01
    """Standard deviation of the initial weights of the generating layers."""
    visual_embeddings: Literal["shared", "own"] = "own"
    """Whether the visual branch uses the layer and block embeddings of the task branch, row for row (needs
    prefix_length equal to the number of image cells, 49 in the paper) or has its own."""
    train_norms: bool = True
    """Train the backbone's layer norms, as a bank held with the hypernetwork."""


@dataclass(frozen=True)
class VisionConfig:
    """Image features. `encoder` None means a run with text only."""

    encoder: str | None = None
    """efficientnet_lite0, a torchvision model name, or clip; see vision.py."""
    weights: str | None = None
    """A local file, folder or hub id with the encoder's weights."""
    image_size: int = 224
    """Side of the square that an image is resized to, in pixels."""
    stage: str | None = None
    """Which feature map to take; None takes the encoder's last."""
    cells: int = 49
    """Cells of the feature grid (V)."""
    channels: int = 2048
    """Channels of a cell (F)."""


@dataclass(frozen=True)
class DataConfig:
    """Shards, mixture and lengths."""

    manifest: str = ""
    """Path of a manifest.json written by data_prep."""
    tasks: tuple[str, ...] = ()
    """Tasks of the run in order; the order gives each task its embedding row. Empty: all of the manifest."""
    temperature: float = 10.0
    """Tasks are drawn with p ~ n^(1/temperature)."""
    task_weights: dict[str, float] = field(default_factory=dict)
    """Explicit sampling weights by task name; replaces the temperature where given (then for all tasks)."""
    max_source_length: int = 128
    """Source tokens kept; longer sources are cut and counted."""
    max_target_length: int = 32
    """Target tokens allowed; a longer target is an error (a cut target would teach a wrong one)."""
    workers: int = 0
    """Reading processes per rank; 0 reads in the training process."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation and what happens when."""

    seed: int = 0
    steps: int = 1000
    """Optimizer steps."""
    global_batch: int = 64
    """Samples per optimizer step over all ranks."""
    micro_batch: int = 16
    """Samples per forward pass on one rank; accumulation follows from the two batches and the world size."""
    learning_rate: float = 3e-4
    warmup_steps: int = 100
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.0
    gradient_clipping: float = 1.0
    """Norm the gradient is clipped to; 0 does not clip."""
    label_smoothing: float = 0.0
    log_every: int = 10
    save_every: int = 500
    keep_checkpoints: int = 2
    eval_every: int = 500
    patience: int = 0
    """Stop after this many validations without a better mean score; 0 never stops early."""


@dataclass(frozen=True)
class EvalConfig:
    """Validation and scoring by generation."""

    batch_size: int = 32
    samples_per_task: int = 0
    """Validation samples of each task while training; 0 takes all."""
    num_beams: int = 1


@dataclass(frozen=True)
class Config:
    """A whole run."""

    recipe: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    hypernet: HypernetConfig = field(default_factory=HypernetConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def override(self, assignments: typing.Iterable[str]) -> Config:
        """A copy changed by `section.key=value` strings; values are JSON, or else plain strings.

        Raises ValueError that names the field, what was given and what is allowed.
        """
        tree = to_dict(self)
        for assignment in assignments:
            name, sign, text = str(assignment).partition("=")
            section, dot, key = name.partition(".")
            if not sign or not dot:
                raise ValueError(f"override {assignment!r}: expected section.key=value, for example train.steps=100")
            _known(section, [n for n in tree if n != "recipe"], "section")
            _known(key, list(tree[section]), f"key of {section}")
            tree[section][key] = _parse(text)
        return from_dict(tree)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON types; `from_dict` reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(tree: dict[str, Any]) -> Config:
    """Builds and checks a Config; raises ValueError that names the field, the value and what is allowed."""
    config: Config = _build(Config, tree, "")
    _check_ranges(config)
    return config


def load(path: str | Path) -> Config:
    try:
        return from_dict(json.loads(Path(path).read_text()))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"configuration {path} cannot be read: {error}") from error


def save(config: Config, path: str | Path) -> None:
    Path(path).write_text(json.dumps(to_dict(config), indent=2) + "\n")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None if text == "None" else {"True": True, "False": False}.get(text, text)


def _known(name: str, allowed: list[str], what: str) -> None:
    if name not in allowed:
        near = difflib.get_close_matches(name, allowed, 3, 0.4) or allowed
        raise ValueError(f"unknown {what}: {name!r}; did you mean {', '.join(near)}?")


def _build(cls: type, tree: Any, where: str) -> Any:
    if not isinstance(tree, dict):
        raise ValueError(f"{where or 'config'}: expected a table of fields, got {tree!r}")
    hints = typing.get_type_hints(cls)
    for name in tree:
        _known(name, list(hints), f"key of {where}" if where else "section")
    return cls(**{name: _coerce(hints[name], value, f"{where}.{name}".lstrip(".")) for name, value in tree.items()})


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _coerce(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: got {value!r}, allowed are {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if isinstance(value, str):
            value = [part for part in value.split(",") if part]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        return tuple(_coerce(arguments[0], item, where) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a table, got {value!r}")
        return {str(name): _coerce(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}: expected {hint.__name__}, got {value!r} ({type(value).__name__})")
    return value


_POSITIVE = (
    "hypernet.prefix_length",
    "hypernet.embedding_size",
    "hypernet.hidden_size",
    "hypernet.hyper_size",
    "hypernet.bottleneck",
    "vision.image_size",
    "vision.cells",
    "vision.channels",
    "data.temperature",
    "data.max_source_length",
    "data.max_target_length",
    "train.steps",
    "train.global_batch",
    "train.micro_batch",
    "train.learning_rate",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.eval_every",
    "eval.batch_size",
    "eval.num_beams",
)
_NOT_NEGATIVE = (
    "hypernet.head_std",
    "data.workers",
    "train.seed",
    "train.warmup_steps",
    "train.weight_decay",
    "train.gradient_clipping",
    "train.patience",
    "eval.samples_per_task",
)


def _check_ranges(config: Config) -> None:
    def value(name: str) -> Any:
        section, key = name.split(".")
        return getattr(getattr(config, section), key)

    for name in _POSITIVE:
        if not value(name) > 0:
            raise ValueError(f"{name}: must be greater than 0, got {value(name)}")
    for name in _NOT_NEGATIVE:
        if value(name) < 0:
            raise ValueError(f"{name}: must not be negative, got {value(name)}")
    for name in ("model.dropout", "train.label_smoothing"):
        if value(name) is not None and not 0 <= value(name) < 1:
            raise ValueError(f"{name}: must lie in [0, 1), got {value(name)}")
    if not config.hypernet.modules:
        raise ValueError("hypernet.modules: must name at least one of 'prefix', 'adapter'")
    if len(set(config.data.tasks)) != len(config.data.tasks):
        raise ValueError(f"data.tasks: a task is named twice in {list(config.data.tasks)}")
    bad = {task: weight for task, weight in config.data.task_weights.items() if weight <= 0}
    if bad:
        raise ValueError(f"data.task_weights: must be greater than 0, got {bad}")
    shared = config.vision.encoder is not None and config.hypernet.visual_embeddings == "shared"
    if shared and config.hypernet.prefix_length != config.vision.cells:
        raise ValueError(
            f"hypernet.visual_embeddings='shared' needs hypernet.prefix_length equal to vision.cells, "
            f"got {config.hypernet.prefix_length} and {config.vision.cells}; use 'own'"
        )
