"""Frozen image encoders: from pictures to a grid of feature cells, (B, V, F).

Used when shards are prepared and when a model is asked about a new image; never inside a training step. It knows
nothing of tasks, questions or hypernetworks. An encoder's `describe()` goes into the manifest beside the features it
made, so that features and encoder can be held against each other later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hyperpelt_ds.config import VisionConfig
from hyperpelt_ds.vision.images import Picture, read_batch
from hyperpelt_ds.vision.lite import EfficientNetLite0

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LITE = (127 / 255,) * 3, (128 / 255,) * 3


class VisionEncoder:
    """A frozen encoder with its transform, on one device.

    `grid` maps normalised pixels (B, 3, image_size, image_size) to features (B, V, F). `cells` (V) and `channels` (F)
    are found by running it once. `weights` is only read, for the fingerprint.
    """

    def __init__(
        self,
        about: dict[str, Any],
        grid: nn.Module,
        weights: Iterable[tuple[str, Tensor]],
        mean_std: tuple[Sequence[float], Sequence[float]],
        device: str | torch.device = "cpu",
    ):
        self.device, self.image_size = torch.device(device), int(about["image_size"])
        self._about = {**about, "sha256": fingerprint(weights)}
        self._grid = grid.to(self.device)
        self._mean, self._std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in mean_std)
        black = torch.zeros((1, self.image_size, self.image_size, 3), dtype=torch.uint8)
        self.cells, self.channels = self.encode_pixels(black).shape[1:]

    def encode(self, pictures: Sequence[Picture], batch_size: int = 32) -> Tensor:
        """Features of pictures or files of pictures, (B, V, F) float32 on the CPU; cells run row by row from the top
        left. Raises UnreadableImage (a ValueError) that names the picture."""
        batches = [pictures[first : first + batch_size] for first in range(0, len(pictures), batch_size)]
        pixels = (torch.from_numpy(read_batch(batch, self.image_size)) for batch in batches)
        return torch.cat([self.encode_pixels(batch).cpu() for batch in pixels])

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Features (B, V, F) float32 on the encoder's device, of pixels (B, image_size, image_size, 3) uint8."""
        with _full_precision(self.device):
            x = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
            x = ((x - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
            return self._grid(x).float()

    def describe(self) -> dict[str, Any]:
        """Name, image size, stage and a sha256 of the weights: equal descriptions make equal features."""
        return dict(self._about)


def load_encoder(config: VisionConfig, device: str | torch.device = "cpu") -> VisionEncoder:
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
        patches, weights = clip.load_clip(config.weights, config.image_size)
        return VisionEncoder(about, patches, weights, (clip.MEAN, clip.STD), device)
    if config.encoder == "efficientnet_lite0":
        lite, stage = EfficientNetLite0(), config.stage or "head"
        _fill(lite, config.weights)
        grid = _Cells(lite.feature_map(stage))
        return VisionEncoder({**about, "stage": stage}, grid, lite.state_dict().items(), _LITE, device)
    model = _torchvision(config.encoder, config.weights)
    stage = config.stage or _last_stage(model, config.encoder)
    grid = _Cells(_torchvision_map(model, config.encoder, stage))
    return VisionEncoder({**about, "stage": stage}, grid, model.state_dict().items(), _IMAGENET, device)


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(weights, key=lambda pair: pair[0]):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """float32 throughout, and on a GPU the same sums every time: cuDNN would round convolutions to TF32."""
    with (
        torch.autocast(device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
    ):
        yield


class _Cells(nn.Module):
    """Turns a (B, F, h, w) feature map into cells, (B, h * w, F)."""

    def __init__(self, feature_map: nn.Module):
        super().__init__()
        self.feature_map = feature_map.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.feature_map(pixels)
        if features.ndim != 4 or features.shape[2] != features.shape[3]:
            raise ValueError(
                f"vision.stage: of a picture this layer gives numbers of shape {tuple(features.shape[1:])}, expected "
                "channels x height x width; take another layer, or another encoder (clip for a transformer)"
            )
        return features.flatten(2).transpose(1, 2)


def _fill(model: nn.Module, path: str) -> None:
    """Loads a state dict (.safetensors, or torch's own format) that must fit, and sets eval mode."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"vision.weights: no file {path}; give the one that the features were made with")
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
