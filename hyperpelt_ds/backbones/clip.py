"""CLIP's image tower as a source of feature cells; here because only backbones may import transformers.

It knows nothing of the seq2seq models beside it, and of images only pixels: resizing is the caller's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, CLIPVisionModel

from hyperpelt_ds.backbones.hub import cannot_load, check_whole

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def load_clip(path: str, image_size: int) -> tuple[nn.Module, list[tuple[str, Tensor]]]:
    """A module from pixels (B, 3, image_size, image_size), normalised by MEAN and STD, to the last layer's patch
    states (B, V, F) without the class token; and the tower's weights by name.

    `path` is a local folder or a hub id. Raises ValueError if it cannot be loaded, if it holds no CLIP tower or not all
    of one, or if the tower was made for another image size.
    """
    try:
        kind = AutoConfig.from_pretrained(path).model_type
        if kind not in ("clip", "clip_vision_model"):
            raise ValueError(f"vision.weights: {path} holds a model of type {kind!r}, expected clip or its image tower")
        found: Any = CLIPVisionModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        model, loaded = found
        check_whole("vision.weights", path, loaded["missing_keys"])
    except OSError as error:
        raise cannot_load("vision.weights", path, error) from error
    model.eval().requires_grad_(False)
    expected = model.config.image_size
    if image_size != expected:
        raise ValueError(f"vision.image_size: {path} takes images of {expected} pixels, got {image_size}")
    return _Patches(model), list(model.state_dict().items())


class _Patches(nn.Module):
    def __init__(self, tower: CLIPVisionModel):
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tower(pixel_values=pixels).last_hidden_state[:, 1:]
