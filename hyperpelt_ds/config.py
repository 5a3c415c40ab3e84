"""The configuration of a run: frozen dataclasses, checked by type and range, to and from JSON.

The recipe owns what is here. Precision, ZeRO, buckets and offload belong to the DeepSpeed JSON and are not here.
fire passes whatever it parsed, so all checking of names and types happens in this file.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class ModelConfig:
    """The frozen backbone."""

    backbone: str = ""
    """A local folder or a hub id of a BART, Marian, T5, mT5, Llama, Mistral or Qwen2 model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the frozen weights, and of the activations except where the DeepSpeed JSON asks for autocast while
    training; validation and generation run without autocast."""
    dropout: float | None = None
    """Dropout inside the backbone while training; None keeps the model's own rates."""
    train_backbone: bool = False
    """Full fine-tuning: the backbone itself is trained, inside the engine, and is in every checkpoint."""
    shard_backbone: bool = False
    """Split the frozen weights over the ranks: each has its share of all, and one block whole, gathered as it runs.
    Same results; for models that do not fit one device. Alone, a process has all of it as ever."""
    quantize: Literal["none", "int8"] = "none"
    """int8 keeps the linear maps of the frozen model's blocks as 8-bit integers, one scale a row (needs torchao)."""
    activation_checkpointing: bool = False
    """Recompute the backbone's layers in the backward pass (non-reentrant)."""
    prefix_form: Literal["auto", "materialised", "absorbed"] = "auto"
    """How attention uses generated prefixes: as keys and values that are made for each condition, or as the rows that
    these would be made from, with the map taken into query and output. Same results; `auto` takes what costs less."""
    generation_budget_mb: float | None = None
    """MiB of generated adapters and low-rank deltas that a training or validation step may hold at a time, together.
    Beyond it they are made a chunk of sites at a time and made again in the backward pass, for more time (weights of
    every image in a batch, of a large model). None holds all: what is free on a device must not decide how sums round.
    A chunk has at least 4 x hypernet.hyper_size / conditions sites, and decoding always holds all."""


PREFIX_BLOCKS = Literal["encoder_self", "decoder_self", "decoder_cross"]
BLOCKS = Literal["encoder_self", "decoder_self", "decoder_cross", "encoder_ffn", "decoder_ffn"]


@dataclass(frozen=True)
class ModulesConfig:
    """The small modules beside the frozen model: which, where and how large, whatever makes their weights."""

    kinds: tuple[Literal["prefix", "adapter", "lora"], ...] = ("prefix", "adapter")
    """("prefix",) is HyperPrefix, ("prefix", "adapter") is HyperPELT. None at all only with model.train_backbone."""
    prefix_length: int = 49
    """Rows of the prefix (P), except of an image's, which has a row for every cell."""
    prefix_blocks: tuple[PREFIX_BLOCKS, ...] = ("encoder_self", "decoder_self", "decoder_cross")
    """The kinds of attention that get prefixes."""
    prefix_weighting: Literal["none", "offset", "gate"] = "none"
    """A learned number for each attention block that weights its prefix columns: `offset` is added to their scores,
    `gate` multiplies their share before normalising (a sigmoid). Both start at no change worth noting."""
    bottleneck: int = 16
    """Bottleneck of the adapters (R)."""
    adapter_blocks: tuple[BLOCKS, ...] = ("encoder_ffn", "decoder_ffn")
    """The blocks that get an adapter."""
    adapter_placement: Literal["parallel", "sequential"] = "parallel"
    """Parallel adapters read the block's input, sequential ones its output; both add to its output."""
    adapter_activation: Literal["relu", "gelu", "gelu_new", "silu"] = "relu"
    """What stands between an adapter's two linear maps."""
    adapter_scale: Literal["learned", "fixed"] = "learned"
    """Whether the factor on an adapter's output (the paper's lambda) is trained."""
    adapter_scale_value: float = 1.0
    """The factor on an adapter's output, or its start if it is learned."""
    adapter_scale_sharing: Literal["position", "shared"] = "position"
    """One learned factor for each block, or one for all."""
    adapter_norm: bool = False
    """A layer norm on the adapter's output, its gain and shift made like the other weights (HyperFormer)."""
    adapter_start: Literal["no_op", "normal"] = "no_op"
    """Whether a new adapter (or low-rank delta) adds exactly nothing, or all of its weights start at random."""
    lora_rank: int = 8
    """Rank of the low-rank deltas (r)."""
    lora_alpha: float = 16.0
    """Low-rank deltas are scaled by lora_alpha / lora_rank."""
    lora_targets: tuple[Literal["query", "key", "value", "output", "gate", "up", "down"], ...] = ("query", "value")
    """The linear maps that get low-rank deltas: four of every attention block, and those of the feed-forward blocks
    (gate only where the model has a gated one)."""
    train_norms: bool = True
    """Train the backbone's layer norms, as a bank held beside the modules."""


@dataclass(frozen=True)
class HypernetConfig:
    """What makes the modules' weights: a hypernetwork from conditions (sizes as in the paper), or, for the methods that
    it is compared with, plain parameters."""

    conditions: tuple[Literal["task", "image", "description"], ...] = ("task", "image")
    """Each makes one branch of modules, and branches add up. `task` is a trained embedding of the task, `image` the
    cells of the image (only with vision.encoder), `description` a sentence about the task under a frozen encoder."""
    parameters: Literal["none", "task", "shared"] = "none"
    """A branch of plain parameters: a set for each task, or one shared by all (adapters, prefix-tuning, LoRA, MAM)."""
    prefix_mlp: int = 0
    """Hidden size of the MLP that a shared plain prefix is made with while training (prefix-tuning); 0 for none."""
    sentence_encoder: str | None = None
    """A local folder or hub id of a BERT-like sentence encoder, for the condition `description`."""
    embedding_size: int = 64
    """Size of a row of the task, layer and block embeddings (d)."""
    hidden_size: int = 128
    """Width of the projector between its linear layers."""
    projector_depth: int = 2
    """Linear layers of the projector, with a ReLU between them."""
    hyper_size: int = 64
    """Size of the hyper-embedding (E)."""
    projector_norm: bool = True
    """Layer norm on the hyper-embedding, as HyperFormer has."""
    rows: Literal["expanded", "table"] = "expanded"
    """Whether every task, layer and block embedding has its own vector for each prefix row, or one vector to which a
    common table of row vectors is added."""
    copies: Literal[1, 2] = 1
    """One hypernetwork for both stacks, or one each (HyperFormer); task embeddings are common either way."""
    head_std: float = 0.01
    """Standard deviation of the initial weights of the generating layers."""
    hyper_scale: float = 1.0
    """Factor on hyper-embeddings before the generating layers, which start larger by as much, so that what they make at
    the start is the same. A generated weight then moves this many times as far in a step: it is a sum of hyper_size
    terms, and an optimizer like AdamW moves all of them."""
    visual_embeddings: Literal["shared", "own"] = "own"
    """Whether the visual branch uses the layer and block embeddings of the task branch, row for row (needs
    modules.prefix_length equal to the number of image cells, 49 in the paper) or has its own."""


@dataclass(frozen=True)
class VisionConfig:
    """Image features. `encoder` None means a run with text only."""

    encoder: str | None = None
    """efficientnet_lite0, a torchvision model name, or clip; see vision/."""
    weights: str | None = None
    """A local file, folder or hub id with the encoder's weights; for an encoder of torchvision also `default`."""
    image_size: int = 224
    """Side of the square that an image is resized to, in pixels."""
    stage: str | None = None
    """Which feature map to take; None takes the encoder's last."""
    cells: int = 49
    """Cells of the feature grid (V)."""
    channels: int = 2048
    """Channels of a cell (F)."""
    tokens: bool = False
    """Give the image to the encoder as well, as one projected token for every cell after the text; to a model without
    an encoder, between source and target."""


@dataclass(frozen=True)
class DataConfig:
    """Shards, mixture and lengths."""

    manifest: str = ""
    """A manifest.json written by data_prep: a path, or a URL (http, https, s3, gs, hf)."""
    plain: dict[str, str] = field(default_factory=dict)
    """Task -> shards as webdataset names them (files, http, `pipe:COMMAND`; braces, `::`), to train on data that cannot
    be seeked. webdataset's own pipeline then draws the training samples: a sample may come twice or not at all, and the
    run cannot be resumed. Validation and image features are the manifest's. It names all trained tasks, or none."""
    tasks: tuple[str, ...] = ()
    """Tasks of the run in order; the order gives each task its embedding row. Empty: all of the manifest."""
    train_tasks: tuple[str, ...] = ()
    """The tasks of the run that are trained on and validated; empty: all of them. The others only keep their rows."""
    shots: int = 0
    """Training samples of each task, chosen by train.seed; 0 takes all."""
    temperature: float = 10.0
    """Tasks are drawn with p ~ n^(1/temperature)."""
    task_weights: dict[str, float] = field(default_factory=dict)
    """Explicit sampling weights by task name; replaces the temperature where given (then for all tasks)."""
    loss_weights: dict[str, float] = field(default_factory=dict)
    """Factors on the loss of a task's samples; 1 for a task that is not named."""
    lanes: int = 0
    """Into how many lanes the order of the samples is dealt. The world sizes that divide it all see the same global
    batches; it must divide train.global_batch and stay the same for a run. 0 takes the common part of the global batch
    and 192."""
    name_task: bool = False
    """Begin every source with its task's name. Weights that all tasks share cannot tell two tasks on the same kind of
    input apart otherwise; weights made from the task can."""
    max_source_length: int = 128
    """Source tokens kept; longer sources are cut and counted."""
    max_target_length: int = 32
    """Target tokens allowed. A longer target is never cut, which would teach a wrong one: it is an error where the look
    before the first step finds it, and otherwise a sample that cannot be used."""
    workers: int = 0
    """Reading processes per rank; 0 reads in the training process."""
    max_holes: int = 100
    """A sample that cannot be used (damaged, of a wrong form, without its image's features) is left out and counted.
    The run stops once there are more of them than this, and more than max_hole_share of what was drawn."""
    max_hole_share: float = 0.001
    """See max_holes."""
    cache: str = "~/.cache/hyperpelt_ds"
    """Folder of this machine where shards of a remote manifest are kept; all processes and runs may share it."""
    cache_gb: float = 100.0
    """Size that folder may grow to, in 10^9 bytes; 0 keeps no shards and reads single samples over the network."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation and what happens when."""

    seed: int = 0
    """Of the initial weights, the order of the data and dropout."""
    steps: int = 1000
    """Optimizer steps."""
    global_batch: int = 64
    """Samples per optimizer step over all ranks."""
    micro_batch: int = 16
    """Samples per forward pass on one rank, or its share of the global batch if that is less; accumulation follows from
    the two batches and the world size. It is the mean: a rank's samples are sorted by length, and up to twice as many
    of like length go together to save padding; micro_tokens sets a limit."""
    micro_tokens: int = 0
    """About how many tokens a forward pass may have, padding included, as estimated from the bytes of the texts. A step
    then has as many micro-batches as that takes, the same number on every rank, whatever micro_batch says. 0: no limit,
    and always as many as micro_batch says."""
    learning_rate: float = 3e-4
    """The highest of the run, of AdamW."""
    warmup_steps: int = 100
    """Steps in which the rate rises from nothing; then comes the schedule."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls from the end of the warm-up to 0 at the last step, if at all."""
    weight_decay: float = 0.0
    """AdamW's, on the weights of linear maps alone: not on embeddings, biases, norms and learned factors. None where
    only embeddings of tasks are trained."""
    gradient_clipping: float = 1.0
    """Norm the gradient is clipped to; 0 does not clip."""
    label_smoothing: float = 0.0
    """Share of each target token's weight that is spread over the vocabulary, in training alone."""
    log_every: int = 10
    """Steps between lines of metrics."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """So many of the newest checkpoints stay; the best one stays besides."""
    keep_every: int = 0
    """And so do those of steps that this divides; 0: none."""
    eval_every: int = 500
    """Steps between validations; there is one after the last step too."""
    patience: int = 0
    """Stop after this many validations without a better mean score; 0 never stops early."""
    max_consecutive_skips: int = 8
    """A step whose loss or gradient is not finite on any rank changes no weight. After so many in a row the run goes
    back to its newest checkpoint, once, leaving out their samples and those of as many steps before; the next time it
    ends."""
    check_every: int = 500
    """Steps between looks whether all ranks hold the same weights; the first step is always looked at."""
    start_limit: float = 1800.0
    """Seconds without progress after which a process ends itself (exit code 70): before the second step. 0: no limit,
    here and below."""
    step_limit: float = 300.0
    """In a step, or 20 times the median of the last steps if that is more. Reading a remote shard again and again may
    take three minutes."""
    eval_limit: float = 600.0
    """In a batch of a validation."""
    save_limit: float = 600.0
    """In saving a checkpoint."""


@dataclass(frozen=True)
class TransferConfig:
    """Where the trainables start, if not at random, and which of them are trained."""

    init_from: str = ""
    """Folder of a finished run whose weights this one starts from."""
    like: dict[str, str] = field(default_factory=dict)
    """For a task that init_from does not have: the task whose weights it starts from. A new task left out here starts
    from the one that answers its training samples with the lowest loss."""
    train: Literal["all", "embeddings"] = "all"
    """`embeddings` trains only what belongs to the tasks of data.train_tasks alone: their embeddings, or their own sets
    of plain parameters. Every other task then stays as it is, to the last bit."""


@dataclass(frozen=True)
class EvalConfig:
    """Validation and scoring by generation."""

    batch_size: int = 32
    """Samples that are generated for at a time on one rank."""
    samples_per_task: int = 0
    """Validation samples of each task while training; 0 takes all."""
    num_beams: int = 1
    """Beams of the search; 1 takes the likeliest token each time."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    recipe: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    modules: ModulesConfig = field(default_factory=ModulesConfig)
    hypernet: HypernetConfig = field(default_factory=HypernetConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)

    @property
    def trained_tasks(self) -> tuple[str, ...]:
        """The tasks that are drawn and validated, in order."""
        return self.data.train_tasks or self.data.tasks

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


_MAY_BE_INFINITE = ("data.temperature",)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        if value == "":
            raise ValueError(f"{where}: is empty; null is for none")
        return _coerce(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments or type(value) not in map(type, arguments):
            raise ValueError(f"{where}: got {value!r}, allowed are {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        return tuple(_coerce(arguments[0], item, where) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a table, got {value!r}")
        return {str(name): _coerce(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value) and where not in _MAY_BE_INFINITE:
        raise ValueError(f"{where}: expected a finite number, got {value}")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}: expected {hint.__name__}, got {value!r} ({type(value).__name__})")
    return value


POSITIVE = (  # these three are what docs/configuration.md says is allowed
    "modules.prefix_length",
    "modules.bottleneck",
    "modules.adapter_scale_value",
    "modules.lora_rank",
    "modules.lora_alpha",
    "hypernet.embedding_size",
    "hypernet.hidden_size",
    "hypernet.projector_depth",
    "hypernet.hyper_size",
    "hypernet.hyper_scale",
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
    "train.max_consecutive_skips",
    "train.check_every",
    "eval.batch_size",
    "eval.num_beams",
)
NOT_NEGATIVE = (
    "hypernet.prefix_mlp",
    "hypernet.head_std",
    "data.shots",
    "data.workers",
    "data.lanes",
    "data.max_holes",
    "data.cache_gb",
    "train.micro_tokens",
    "train.seed",
    "train.warmup_steps",
    "train.weight_decay",
    "train.gradient_clipping",
    "train.keep_every",
    "train.patience",
    "train.start_limit",
    "train.step_limit",
    "train.eval_limit",
    "train.save_limit",
    "eval.samples_per_task",
)
SHARES = ("model.dropout", "train.label_smoothing", "data.max_hole_share")


def _check_ranges(config: Config) -> None:
    def value(name: str) -> Any:
        section, key = name.split(".")
        return getattr(getattr(config, section), key)

    for name in POSITIVE:
        if not value(name) > 0:
            raise ValueError(f"{name}: must be greater than 0, got {value(name)}")
    for name in NOT_NEGATIVE:
        if not value(name) >= 0:
            raise ValueError(f"{name}: must not be negative, got {value(name)}")
    for name in SHARES:
        if value(name) is not None and not 0 <= value(name) < 1:
            raise ValueError(f"{name}: must lie in [0, 1), got {value(name)}")
    budget = config.model.generation_budget_mb
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(f"model.generation_budget_mb: must be a number greater than 0, or null for all, got {budget}")
    _check_modules(config)
    if len(set(config.data.tasks)) != len(config.data.tasks):
        raise ValueError(f"data.tasks: a task is named twice in {list(config.data.tasks)}")
    for task in config.data.train_tasks:
        if config.data.tasks and task not in config.data.tasks:
            raise ValueError(f"data.train_tasks: {task!r} is not one of data.tasks, {', '.join(config.data.tasks)}")
    if config.transfer.train == "embeddings" and not (config.transfer.init_from and config.data.train_tasks):
        raise ValueError("transfer.train='embeddings' needs transfer.init_from and data.train_tasks")
    for field_name in ("task_weights", "loss_weights"):
        bad = {task: weight for task, weight in getattr(config.data, field_name).items() if not 0 < weight < math.inf}
        if bad:
            raise ValueError(f"data.{field_name}: must be greater than 0, got {bad}")
    for task, shards in config.data.plain.items():
        if not shards:
            raise ValueError(f"data.plain: no shards are named for task {task!r}")
    for name in ("data.shots", "train.micro_tokens"):
        if config.data.plain and value(name):
            raise ValueError(f"{name}: with data.plain nothing is known of a sample before it is read; set {name}=0")
    for task in config.data.loss_weights:
        if config.data.tasks and task not in config.data.tasks:
            raise ValueError(f"data.loss_weights: {task!r} is not one of data.tasks, {', '.join(config.data.tasks)}")


def _check_modules(config: Config) -> None:
    """What is attached, and what makes it, must fit together: nothing asked for may quietly be left out."""
    modules, hypernet, vision = config.modules, config.hypernet, config.vision
    for name, needed_by in (("prefix_blocks", "prefix"), ("adapter_blocks", "adapter"), ("lora_targets", "lora")):
        values = getattr(modules, name)
        if needed_by in modules.kinds and not values:
            raise ValueError(f"modules.{name}: must name at least one for modules.kinds with {needed_by!r}")
    conditions = [name for name in hypernet.conditions if name != "image" or vision.encoder is not None]
    makers = [*conditions, *(["parameters"] if hypernet.parameters != "none" else [])]
    if not modules.kinds and not config.model.train_backbone:
        raise ValueError("modules.kinds: must name at least one of 'prefix', 'adapter', 'lora'")
    if modules.kinds and not makers:
        raise ValueError(
            "hypernet.conditions: nothing makes the weights of modules.kinds; name 'task', 'image' (with "
            "vision.encoder) or 'description', or set hypernet.parameters to 'task' or 'shared'"
        )
    for section, name in (
        ("modules", "kinds"),
        ("modules", "prefix_blocks"),
        ("modules", "adapter_blocks"),
        ("modules", "lora_targets"),
        ("hypernet", "conditions"),
    ):
        values = getattr(getattr(config, section), name)
        if len(set(values)) != len(values):
            raise ValueError(f"{section}.{name}: one is named twice in {list(values)}")
    if "description" in hypernet.conditions and hypernet.sentence_encoder is None:
        raise ValueError("hypernet.sentence_encoder: 'description' in hypernet.conditions needs one")
    if hypernet.prefix_mlp and (hypernet.parameters != "shared" or "prefix" not in modules.kinds):
        raise ValueError("hypernet.prefix_mlp: needs hypernet.parameters='shared' and 'prefix' in modules.kinds")
    if vision.tokens and vision.encoder is None:
        raise ValueError("vision.tokens: there are no image features without vision.encoder")
    if config.model.train_backbone and config.model.dtype != "float32":
        raise ValueError(
            f"model.dtype: model.train_backbone needs float32 master weights, got {config.model.dtype}; "
            f"let the DeepSpeed JSON choose the precision of the step"
        )
    for name, off in (("shard_backbone", False), ("quantize", "none")):
        given = getattr(config.model, name)
        if config.model.train_backbone and given != off:
            raise ValueError(
                f"model.{name}: got {given!r}, but model.train_backbone trains the backbone, it must be whole"
            )
    shared = "image" in conditions and hypernet.visual_embeddings == "shared" and hypernet.rows == "expanded"
    if shared and modules.prefix_length != vision.cells:
        raise ValueError(
            f"hypernet.visual_embeddings='shared' needs modules.prefix_length equal to vision.cells, "
            f"got {modules.prefix_length} and {vision.cells}; use 'own'"
        )
