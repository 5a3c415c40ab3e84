"""HyperPELT: a hypernetwork and the frozen backbone that it adapts.

It knows no files but a finished run's folder (`load`), and nothing of optimisation or of other processes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from hyperpelt_ds import config as configs
from hyperpelt_ds import task_file
from hyperpelt_ds.backbones import Backbone, load_backbone, sentence_vectors
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Batch, Conditions, Sample, Weights
from hyperpelt_ds.data.collate import collator_for
from hyperpelt_ds.hypernet import HyperNetwork
from hyperpelt_ds.kernels.regenerate import made_type
from hyperpelt_ds.tasks import TASKS, adopt, get, needs_image
from hyperpelt_ds.vision import Picture, VisionEncoder, load_encoder

IDENTITY = "identity.json"


class Output(NamedTuple):
    """loss: the weighted sum over samples, with gradient. sample_losses (B,): mean over target tokens, without."""

    loss: Tensor
    sample_losses: Tensor


class HyperPELT(nn.Module):
    """What the engine trains: only the hypernetwork is registered, the backbone is held beside it (unless it is itself
    trained, model.train_backbone).

    `tasks` in order give each task its row in the embedding table; `descriptions` (tasks, F') are the frozen vectors of
    what is said about them, for the condition `description`.
    """

    def __init__(self, config: Config, backbone: Backbone, tasks: Sequence[str], descriptions: Tensor | None = None):
        super().__init__()
        vision = config.vision if config.vision.encoder else None
        available = Conditions(
            len(tasks), vision.cells if vision else None, vision.channels if vision else None, descriptions
        )
        self.hypernet = HyperNetwork(
            config.hypernet, config.modules, backbone.geometry, available, backbone.initial_norms, config.vision.tokens
        )
        self.tasks = tuple(tasks)
        self.prefix_rows = backbone.prefix_form != "materialised"
        self.generation_budget = config.model.generation_budget_mb
        self.label_smoothing = config.train.label_smoothing
        self.backbone = backbone  # no nn.Module, so registration does not see its parameters
        self.trained_backbone = backbone.model if backbone.trainable else None

    @property
    def per_task(self) -> dict[str, int]:
        """The parameters that have an entry for each task, by name, and the dimension along which they do."""
        return {f"hypernet.{name}": dim for name, dim in self.hypernet.per_task.items()}

    @torch.no_grad()
    def add_task(self, name: str, entries: dict[str, Tensor]) -> None:
        """Appends a task to a model that is not being trained: `entries` hold what belongs to it alone."""
        for parameter_name, dim in self.per_task.items():
            module_name, _, own_name = parameter_name.rpartition(".")
            module = self.get_submodule(module_name)
            parameter = module.get_parameter(own_name)
            longer = torch.cat([parameter, entries[parameter_name].to(parameter)], dim)
            setattr(module, own_name, nn.Parameter(longer))
        self.tasks = (*self.tasks, name)

    def train(self, mode: bool = True) -> HyperPELT:
        super().train(mode)
        self.backbone.train(mode)
        return self

    def to_device(self, device: torch.device) -> HyperPELT:
        """Moves the trainables and the backbone."""
        self.backbone.to(device)
        return self.to(device)

    def parameter_counts(self) -> dict[str, int]:
        """Trainable parameters, and all: the backbone's (its norms counted once) and what is put beside it."""
        sizes = [(p.requires_grad, getattr(p, "ds_numel", p.numel())) for p in self.parameters()]  # ZeRO-3 empties p
        trainable, registered = sum(size for trains, size in sizes if trains), sum(size for _, size in sizes)
        if self.backbone.trainable:
            return {"trainable": trainable, "total": registered}
        frozen = sum(parameter.numel() for parameter in self.backbone.model.parameters())
        norms = self.backbone.initial_norms.numel() if self.hypernet.norms is None else 0
        return {"trainable": trainable, "total": frozen + norms + registered}

    def forward(self, batch: Batch) -> Output:
        """The loss of a batch: sum over samples of loss_weights x mean cross-entropy of the sample's target."""
        self.backbone.slot.set((), None)  # else the last batch's weights stay while these are made
        weights: Weights = self.hypernet(batch, self.prefix_rows, self._most(batch.input_ids.device))
        used, idle = self._split(weights, batch)
        logits = self.backbone.forward(used, batch.input_ids, batch.attention_mask, batch.labels, batch.targets)
        real_losses = F.cross_entropy(
            logits.float(),
            batch.labels.flatten()[batch.targets],
            reduction="none",
            label_smoothing=self.label_smoothing if self.training else 0.0,
        )
        token_losses = real_losses.new_zeros(batch.labels.numel()).index_copy(0, batch.targets, real_losses)
        losses = token_losses.view_as(batch.labels).sum(1) / (batch.labels != -100).sum(1).clamp(min=1)
        loss = (losses * batch.loss_weights).sum()
        for part in idle:
            loss = loss + 0.0 * _total(part)  # every trainable takes part in every step on every rank
        return Output(loss, losses.detach())

    def _most(self, device: torch.device) -> int | None:
        """The generated numbers that may be there at a time; None for any."""
        if self.generation_budget is None:
            return None
        return int(self.generation_budget * 2**20 / made_type(device.type, self.backbone.dtype).itemsize)

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, num_beams: int = 1) -> Tensor:
        """Token ids (B, at most 1 + max_new_tokens); the hypernetwork runs exactly once, whatever is decoded.

        Weights are there as a whole, whatever the budget: every token needs all of them.
        """
        self.backbone.slot.set((), None)
        used, _ = self._split(self.hypernet(batch, self.prefix_rows), batch)
        return self.backbone.generate(used, batch.input_ids, batch.attention_mask, max_new_tokens, num_beams)

    def _split(self, weights: Weights, batch: Batch) -> tuple[Weights, list[Any]]:
        """The weights that some sample uses, and what was made from images if no sample has one.

        Told from the host side of the batch, so that no device has to be waited for.
        """
        if any(sample.image is not None for sample in batch.samples):
            return weights, []
        named = list(zip(self.hypernet.branch_names, weights.branches, strict=True))
        idle = [branch[1:] for name, branch in named if name == "image"]
        used = tuple(branch for name, branch in named if name != "image")
        return weights._replace(branches=used, tokens=None), [*idle, weights.tokens]


def _total(part: Any) -> Tensor | float:
    """The sum over the tensors of (tuples of) module kinds; what no sample refers to is a number all the same."""
    if isinstance(part, Tensor):
        return part.float().sum()
    return sum((_total(item) for item in part), 0.0) if isinstance(part, tuple) else 0.0


def build(config: Config, tasks: Sequence[str]) -> HyperPELT:
    """The model of a configuration, with the hypernetwork drawn from train.seed; the caller's RNG is untouched."""
    backbone = load_backbone(config.model, config.modules)
    _check_lengths(config, backbone)
    descriptions = None
    if "description" in config.hypernet.conditions:
        descriptions = describe(config, [get(name).description for name in tasks])
    with torch.random.fork_rng():
        torch.manual_seed(config.train.seed)
        return HyperPELT(config, backbone, tasks, descriptions)


def _check_lengths(config: Config, backbone: Backbone, answer: int | None = None) -> None:
    """Raises ValueError for lengths that the model has no positions for; `answer` if it is not the configured one."""
    data, cells = config.data, config.vision.cells if config.vision.tokens else 0
    source = {"data.max_source_length": data.max_source_length, **({"vision.cells": cells} if cells else {})}
    target = {"data.max_target_length": data.max_target_length} if answer is None else {"max_new_tokens": answer}
    for part in [source | target] if backbone.one_sequence else [source, target]:
        if backbone.positions is not None and sum(part.values()) > backbone.positions:
            given = " + ".join(f"{name} {length}" for name, length in part.items())
            raise ValueError(
                f"{given} are more than the {backbone.positions} positions of {config.model.backbone}; lower "
                f"one of them"
            )


def describe(config: Config, sentences: Sequence[str]) -> Tensor:
    """The vectors (sentences, F') of the run's frozen sentence encoder; ValueError if the run has none."""
    if config.hypernet.sentence_encoder is None:
        raise ValueError("hypernet.sentence_encoder: the run has none, so that its tasks cannot be described")
    return sentence_vectors(config.hypernet.sentence_encoder, sentences)


class Predictor:
    """A trained run, ready to generate. `made_with` describes the encoder of the features that it was trained on."""

    def __init__(self, config: Config, model: HyperPELT, made_with: dict[str, Any] | None = None, backbone: str = ""):
        self.config, self.model, self.made_with = config, model.eval(), made_with
        self.backbone = backbone
        """The fingerprint of the frozen weights."""
        self.collator = collator_for(config, model.tasks, model.backbone.tokenizer)
        self._encoder: VisionEncoder | None = None

    def add_task(self, file: str | Path) -> str:
        """Adds a task that was trained on top of this run and shipped as a file; its name.

        Raises ValueError if the file is no task file, was trained beside other weights, or names a task that is there.
        """
        task, base, entries = task_file.read(file)
        self._check_new(task)
        weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        now = task_file.base_fingerprint(weights, self.model.per_task, beside(self.config, self.backbone))
        if base != now:
            raise ValueError(
                f"task file {file} was trained beside weights with fingerprint {base[:12]}, this run has "
                f"{now[:12]}: take the run that it was trained from (--init_from)"
            )
        if "description" in self.model.hypernet.conditions:
            source: Any = self.model.hypernet.conditions["description"]
            source.extend(describe(self.config, [get(task).description]))
        self.model.add_task(task, entries)
        self.collator = collator_for(self.config, self.model.tasks, self.model.backbone.tokenizer)
        return task

    def describe_task(self, name: str, sentence: str) -> None:
        """Adds a task that was never trained, by what is said about it; only for a run whose tasks are described.

        Raises ValueError if the run needs more of a task than a description, or has a task of that name.
        """
        self._check_new(name)
        if not self.is_described:
            raise ValueError(
                f"task {name!r} cannot be described: the run was trained with hypernet.conditions="
                f"{list(self.config.hypernet.conditions)} and hypernet.parameters={self.config.hypernet.parameters!r}"
            )
        source: Any = self.model.hypernet.conditions["description"]
        source.extend(describe(self.config, [sentence]))
        self.model.add_task(name, {})
        self.collator = collator_for(self.config, self.model.tasks, self.model.backbone.tokenizer)

    @property
    def is_described(self) -> bool:
        """Whether tasks are told apart by what is said about them, and by nothing else."""
        return "description" in self.model.hypernet.conditions and not self.model.per_task

    @contextmanager
    def described(self, name: str, sentence: str) -> Iterator[None]:
        """Within, the run is told something else about a task of its own."""
        source: Any = self.model.hypernet.conditions["description"]
        before = source.vectors
        source.replace(self.model.tasks.index(name), describe(self.config, [sentence])[0])
        try:
            yield
        finally:
            source.vectors = before

    def _check_new(self, task: str) -> None:
        if task in self.model.tasks:
            raise ValueError(f"task {task!r} is already there: {', '.join(self.model.tasks)}")

    def generate(
        self,
        task: str | Sequence[str],
        texts: Sequence[str],
        images: Sequence[Picture | Sequence[Picture] | None] | None = None,
        num_beams: int = 1,
        max_new_tokens: int | None = None,
    ) -> list[str]:
        """The generated text for each of `texts`, in their order.

        `task` is one name for all texts, or one a text: a call may mix tasks, and texts with images and without. An
        image is a picture or a file of one, or both pictures of a pair for a run that was trained on pairs. At most
        `eval.batch_size` texts, of like length, are answered at once: weights are generated once for them, for every
        distinct task and image. Raises ValueError for an unknown task, for lists of different lengths, for an image
        given to a run without images, and for one that cannot be read.
        """
        names = [task] * len(texts) if isinstance(task, str) else list(task)
        pictures = list(images) if images is not None else [None] * len(texts)
        if not len(names) == len(texts) == len(pictures):
            raise ValueError(f"got {len(texts)} texts, {len(names)} tasks and {len(pictures)} images: give one a text")
        unknown = sorted(set(names) - set(self.model.tasks))
        if unknown:
            raise ValueError(f"unknown task {unknown[0]!r}; this run was trained on {', '.join(self.model.tasks)}")
        blind = [name for name, picture in zip(names, pictures, strict=True) if picture is None and _needs_image(name)]
        if blind:
            raise ValueError(f"task {blind[0]!r} needs an image with every text")
        length = max_new_tokens if max_new_tokens is not None else self.config.data.max_target_length
        _check_lengths(self.config, self.model.backbone, length)
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        found: dict[int, str] = {}
        for start in range(0, len(order), self.config.eval.batch_size):
            part = order[start : start + self.config.eval.batch_size]
            asked = [(names[place], texts[place], pictures[place]) for place in part]
            found.update(zip(part, self._answer(asked, num_beams, length), strict=True))
        return [found[place] for place in range(len(texts))]

    def _answer(
        self, asked: Sequence[tuple[str, str, Picture | Sequence[Picture] | None]], num_beams: int, length: int
    ) -> list[str]:
        """`generate` of one batch of (task, text, image)."""
        names, texts, pictures = zip(*asked, strict=True)
        distinct: dict[Any, str] = {}
        for picture in pictures:
            if picture is not None:
                distinct.setdefault(_identity(picture), f"image{len(distinct)}")
        opened = {distinct[_identity(p)]: p for p in pictures if p is not None}
        features = dict(zip(opened, self.features(list(opened.values())), strict=True)) if opened else {}
        samples = [
            Sample(str(i), name, text, "", image=distinct[_identity(picture)] if picture is not None else None)
            for i, (name, text, picture) in enumerate(zip(names, texts, pictures, strict=True))
        ]
        batch = self.collator(
            samples, {name: feature.numpy() for name, feature in features.items()}, [1.0] * len(samples)
        )
        ids = self.model.generate(batch.to(next(self.model.parameters()).device), length, num_beams)
        decoded = self.model.backbone.decode(ids)
        order = {int(sample.key): text for sample, text in zip(batch.samples, decoded, strict=True)}
        return [order[i] for i in range(len(texts))]

    def features(self, images: Sequence[Picture | Sequence[Picture]]) -> Tensor:
        """The features (images, V, F) of pictures or files of pictures, by the encoder that the run was trained with;
        of several given as one image, the cells of one after the other.

        Raises ValueError for a run without images, an encoder that is another one now, another number of pictures an
        image than the run was trained on, and (as UnreadableImage, with its name) a picture that cannot be read.
        """
        if self.config.vision.encoder is None:
            raise ValueError("an image was given, but this run was trained without images (vision.encoder is not set)")
        if self._encoder is None:
            self._encoder = load_encoder(self.config.vision, next(self.model.parameters()).device)
            made_with, now = self.made_with or {}, self._encoder.describe()
            if any(key in made_with and made_with[key] != value for key, value in now.items()):
                raise ValueError(f"the run was trained on features of {made_with}, but vision.* now gives {now}")
        groups = [_pictures(image) for image in images]
        expected = self.config.vision.cells // self._encoder.cells
        for group in groups:
            if len(group) != expected:
                raise ValueError(f"an image of this run is {expected} pictures, got {len(group)}: {group}")
        cells = self._encoder.encode([picture for group in groups for picture in group])
        return cells.view(len(groups), -1, self._encoder.channels)


def _needs_image(task: str) -> bool:
    """False for a task that is only described: nothing else is known of it."""
    return task in TASKS and needs_image(task)


def _pictures(image: Picture | Sequence[Picture]) -> list[Picture]:
    return [image] if isinstance(image, Picture) else list(image)


def _identity(image: Picture | Sequence[Picture]) -> tuple[Any, ...]:
    return tuple(str(p) if isinstance(p, str | Path) else id(p) for p in _pictures(image))


def load(run_dir: str | Path, device: str | torch.device = "cpu", tasks: Sequence[str | Path] = ()) -> Predictor:
    """The best checkpoint of a run, else its newest one, ready to generate; with the task files `tasks` added.

    Raises ValueError that names the folder or file where something is missing or does not fit.
    """
    folder = Path(run_dir)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no run: it has no config.json")
    config = configs.load(folder / "config.json")
    weights = weights_file(folder)
    identity = identity_of(folder)
    adopt(identity.get("records", {}))
    model = build(config, config.data.tasks)
    if model.backbone.fingerprint() != identity["backbone"]:
        raise ValueError(
            f"{folder} was trained on another backbone than {config.model.backbone} now holds; put back the "
            f"one it had, or name it in model.backbone of {folder / 'config.json'}"
        )
    state = load_file(weights)
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        names = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        pairs = ((name, found.get(name, "missing"), expected.get(name, "missing")) for name in names[:5])
        differences = "; ".join(f"{name} is {there} there, {here} here" for name, there, here in pairs)
        raise ValueError(f"{weights} does not fit {folder / 'config.json'}: {differences}")
    model.load_state_dict(state, strict=False)  # a trained backbone's tied weights have names that are not in the file
    _check_descriptions(folder, model, identity.get("descriptions"), config.hypernet.sentence_encoder)
    predictor = Predictor(config, model.to_device(torch.device(device)), identity["encoder"], identity["backbone"])
    for file in tasks:
        predictor.add_task(file)
    return predictor


def beside(config: Config, backbone: str) -> str:
    """What gives a task's own weights their meaning, but for the weights that it shares with others."""
    hypernet = dataclasses.replace(config.hypernet, sentence_encoder=None, head_std=0.0)
    parts = [dataclasses.asdict(config.modules), dataclasses.asdict(hypernet), config.data.name_task, backbone]
    return json.dumps(parts, sort_keys=True)


def description_sample(model: HyperPELT) -> list[float] | None:
    """A few numbers by which another sentence encoder, or another description, is recognised; None without any."""
    if "description" not in model.hypernet.conditions:
        return None
    source: Any = model.hypernet.conditions["description"]
    sample: list[float] = source.vectors[:, :4].flatten().cpu().tolist()
    return sample


def _check_descriptions(folder: Path, model: HyperPELT, expected: list[float] | None, encoder: str | None) -> None:
    now = description_sample(model)
    if expected is not None and now is not None and not np.allclose(expected, now, atol=0.01):  # machines round apart
        raise ValueError(
            f"{folder} was trained with other vectors of its tasks' descriptions: the sentence encoder "
            f"({encoder}) or the descriptions have changed; put back what there was, or train anew"
        )


def identity_of(run_dir: Path) -> dict[str, Any]:
    """What a run was trained on: fingerprint of the backbone, content of its tasks, description of the encoder."""
    try:
        identity: dict[str, Any] = json.loads((run_dir / IDENTITY).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{run_dir / IDENTITY} cannot be read: {error}") from error
    return identity


def weights_file(run_dir: Path) -> Path:
    """The trained weights of a run: of the best validation if there was one, else of the newest checkpoint."""
    latest = run_dir / "LATEST"
    candidates = [run_dir / "best"] + ([run_dir / latest.read_text().strip()] if latest.is_file() else [])
    for folder in candidates:
        if (folder / "weights.safetensors").is_file():
            return folder / "weights.safetensors"
    raise ValueError(f"{run_dir} has no checkpoint yet: neither best/ nor what LATEST names holds weights.safetensors")
