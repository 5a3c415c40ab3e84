"""Frozen image encoders: from pictures to a grid of feature cells, (B, V, F).

Used when shards are prepared and when a model is asked about a new image; never inside a training step. It knows
nothing of tasks, questions or hypernetworks. An encoder's `describe()` goes into the manifest beside the features it
made, so that features and encoder can be held against each other later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hyperpelt_ds.config import VisionConfig

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LITE = (127 / 255,) * 3, (128 / 255,) * 3


class VisionEncoder:
    """A frozen encoder with its transform.

    `grid` maps normalised pixels (B, 3, image_size, image_size) to features (B, V, F). `cells` (V) and `channels` (F)
    are found by running it once. `weights` is only read, for the fingerprint.
    """

    def __init__(
        self,
        about: dict[str, Any],
        grid: Callable[[Tensor], Tensor],
        weights: Iterable[tuple[str, Tensor]],
        mean_std: tuple[Sequence[float], Sequence[float]],
    ):
        self._grid = grid
        self._about = {**about, "sha256": fingerprint(weights)}
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in mean_std)
        blank = self.encode([Image.new("RGB", (8, 8))])
        self.cells, self.channels = blank.shape[1], blank.shape[2]

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Features of the images, (B, V, F) float32 on the CPU; cells run row by row from the top left."""
        pixels = torch.stack([_pixels(image, self._about["image_size"]) for image in images])
        pixels = ((pixels - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
        return self._grid(pixels).float()

    def describe(self) -> dict[str, Any]:
        """Name, image size, stage and a sha256 of the weights: equal descriptions make equal features."""
        return dict(self._about)


def load_encoder(config: VisionConfig) -> VisionEncoder:
    """The encoder that `config` names: efficientnet_lite0, clip, or the name of a torchvision model.

    Raises ValueError that names the field when the encoder, its weights or its stage cannot be had. Weights are never
    made up: features of a random encoder look like features.
    """
    if config.encoder is None:
        raise ValueError("vision.encoder: the run has no image encoder; set for example efficientnet_lite0")
    if config.weights is None:
        raise ValueError(f"vision.weights: {config.encoder} needs a file or folder with its weights")
    about = {"encoder": config.encoder, "image_size": config.image_size}
    if config.encoder == "clip":
        # The one import across folders of the same rank: transformers may be imported under backbones/ only.
        from hyperpelt_ds.backbones import clip

        if config.stage is not None:
            raise ValueError(f"vision.stage: clip has no stages to choose from, got {config.stage!r}")
        try:
            grid, weights = clip.load_clip(config.weights, config.image_size)
        except OSError as error:
            raise ValueError(f"vision.weights: cannot load {config.weights!r}: {str(error).splitlines()[0]}") from error
        return VisionEncoder(about, grid, weights, (clip.MEAN, clip.STD))
    if config.encoder == "efficientnet_lite0":
        lite, stage = EfficientNetLite0(), config.stage or "head"
        _fill(lite, config.weights)
        grid = _cells(lite.feature_map(stage))
        return VisionEncoder({**about, "stage": stage}, grid, lite.state_dict().items(), _LITE)
    model = _torchvision(config.encoder, config.weights)
    stage = config.stage or _last_stage(model, config.encoder)
    grid = _cells(_torchvision_map(model, config.encoder, stage))
    return VisionEncoder({**about, "stage": stage}, grid, model.state_dict().items(), _IMAGENET)


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(weights, key=lambda pair: pair[0]):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _pixels(image: Image.Image, size: int) -> Tensor:
    """(3, size, size) in 0..1; transparent parts become white, the aspect ratio is not kept."""
    if image.mode in ("RGBA", "LA", "P"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _cells(feature_map: nn.Module) -> Callable[[Tensor], Tensor]:
    """Turns a (B, F, h, w) feature map into cells, (B, h * w, F)."""
    feature_map.to(memory_format=torch.channels_last)
    return lambda pixels: feature_map(pixels).flatten(2).transpose(1, 2)


def _fill(model: nn.Module, path: str) -> None:
    """Loads a state dict (.safetensors, or torch's own format) that must fit, and sets eval mode."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"vision.weights: no file {path}")
    try:
        tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"vision.weights: {path} is damaged or no file of weights: {str(error)[:200]}") from None
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:  # torch lists every name that does not fit; the first line or two tell enough
        raise ValueError(f"vision.weights: {path} does not fit {type(model).__name__}: {str(error)[:300]}") from None
    model.eval()


def _torchvision(name: str, weights: str) -> nn.Module:
    """A classification model of torchvision; `weights` is a file with its state dict, or "default" to download."""
    from torchvision import models

    if name not in models.list_models():
        raise ValueError(
            f"vision.encoder: unknown encoder {name!r}; allowed are efficientnet_lite0, clip and the names that "
            f"torchvision.models.list_models() gives, for example resnet50"
        )
    if weights == "default":
        return models.get_model(name, weights="DEFAULT").eval()
    model = models.get_model(name, weights=None)
    _fill(model, weights)
    return model


def _last_stage(model: nn.Module, name: str) -> str:
    for stage in ("layer4", "features"):
        if hasattr(model, stage):
            return stage
    raise ValueError(f"vision.stage: say which layer of {name} to take; its parts are {_parts(model)}")


def _torchvision_map(model: nn.Module, name: str, stage: str) -> nn.Module:
    """The part of `model` that ends at the feature map `stage`; later layers are never computed."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    nodes = get_graph_node_names(model)[1]
    if not any(node == stage or node.startswith(f"{stage}.") for node in nodes):
        raise ValueError(f"vision.stage: {name} has no layer {stage!r}; its parts are {_parts(model)}")
    return nn.Sequential(create_feature_extractor(model, [stage]), _First())


def _parts(model: nn.Module) -> str:
    return ", ".join(name for name, _ in model.named_children())


class _First(nn.Module):
    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        return next(iter(maps.values()))


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (the mobile variant: no squeeze-and-excitation, ReLU6), with TensorFlow's "same" padding.

    The names of the parameters are those of the published weights, which is why they begin with an underscore.
    """

    # blocks, kernel, stride of the first, expansion, output channels
    GROUPS = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, stride=2, bias=False), _norm(32)
        blocks: list[LiteBlock] = []
        width = 32
        self._ends: list[int] = []
        for repeats, kernel, stride, expansion, output in self.GROUPS:
            for index in range(repeats):
                blocks.append(LiteBlock(width, output, kernel, stride if index == 0 else 1, expansion))
                width = output
            self._ends.append(len(blocks))
        self.blocks = blocks  # typed; the module list holds the same ones
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv(width, 1280, 1, bias=False), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def feature_map(self, stage: str) -> nn.Module:
        """Pixels to the feature map after `stage` ("block1" .. "block7", or "head"), with batch norms folded in."""
        stages = [f"block{i + 1}" for i in range(len(self.GROUPS))]
        if stage not in [*stages, "head"]:
            raise ValueError(f"vision.stage: efficientnet_lite0 has {', '.join(stages)} and head, got {stage!r}")
        last = self._ends[-1] if stage == "head" else self._ends[stages.index(stage)]
        layers: list[nn.Module] = [fuse_conv_bn_eval(self._conv_stem, self._bn0), nn.ReLU6()]
        layers += [block.fused() for block in self.blocks[:last]]
        if stage == "head":
            layers += [fuse_conv_bn_eval(self._conv_head, self._bn1), nn.ReLU6()]
        return nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        """The 1,000 ImageNet logits, (B, 1000)."""
        x = F.relu6(self._bn0(self._conv_stem(pixels)))
        for block in self.blocks:
            x = block(x)
        return self._fc(F.relu6(self._bn1(self._conv_head(x))).mean((2, 3)))


class SameConv(nn.Conv2d):
    """A convolution whose output has ceil(input / stride) rows and columns, padded more at the end than the start."""

    def forward(self, x: Tensor) -> Tensor:
        down, across = (
            max((-(-length // stride) - 1) * stride + kernel - length, 0)
            for length, stride, kernel in zip(x.shape[-2:], self.stride, self.kernel_size, strict=True)
        )
        if down == across and down % 2 == 0:  # even padding on all sides: no copy of the input
            return F.conv2d(x, self.weight, self.bias, self.stride, down // 2, 1, self.groups)
        x = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


class LiteBlock(nn.Module):
    """Expand, depthwise convolution, project; with a shortcut where the shapes allow it."""

    def __init__(self, width: int, output: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        hidden = width * expansion
        self.shortcut = stride == 1 and width == output
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv, self._bn0 = SameConv(width, hidden, 1, bias=False), _norm(hidden)
        self._depthwise_conv = SameConv(hidden, hidden, kernel, stride=stride, groups=hidden, bias=False)
        self._bn1 = _norm(hidden)
        self._project_conv, self._bn2 = SameConv(hidden, output, 1, bias=False), _norm(output)

    def layers(self) -> list[tuple[SameConv, nn.BatchNorm2d]]:
        expand = [(self._expand_conv, self._bn0)] if self.expands else []
        return [*expand, (self._depthwise_conv, self._bn1), (self._project_conv, self._bn2)]

    def fused(self) -> nn.Module:
        return FusedBlock([fuse_conv_bn_eval(conv, norm) for conv, norm in self.layers()], self.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        *first, (conv, norm) = self.layers()
        for early_conv, early_norm in first:
            y = F.relu6(early_norm(early_conv(y)))
        y = norm(conv(y))
        return x + y if self.shortcut else y


class FusedBlock(nn.Module):
    """A LiteBlock whose batch norms are folded into its convolutions."""

    def __init__(self, convs: list[nn.Conv2d], shortcut: bool):
        super().__init__()
        self.convs, self.shortcut = nn.ModuleList(convs), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs[:-1]:
            y = F.relu6(conv(y), inplace=True)
        y = self.convs[-1](y)
        return y.add_(x) if self.shortcut else y


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)
