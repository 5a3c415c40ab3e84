"""EfficientNet-Lite0, the image encoder of the demo, as a plain module that takes the published weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


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
