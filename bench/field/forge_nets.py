"""FORGE's two CIFAR-10 networks (Rehan et al., TMLR 2026; weights: Rehan000/forge-tta@dc71386), from their description."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["forge_mobilenetv2", "forge_resnet20"]

WIDTH = 0.5
# expansion, channels at width 1, blocks, stride of the first
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _normed(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class _Block(nn.Module):
    """Two 3x3 convolutions; where the shape changes, a 1x1 convolution and a norm beside them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _normed(inputs, outputs, 3, stride)
        self.conv2, self.bn2 = _normed(outputs, outputs, 3)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential(*([] if same else _normed(inputs, outputs, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ForgeResNet20(nn.Module):
    """Three stages of three blocks, 16, 32 and 64 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = _normed(3, 16, 3)
        self.layer1 = self._stage(16, 16, 1)
        self.layer2 = self._stage(16, 32, 2)
        self.layer3 = self._stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(_Block(inputs, outputs, stride), _Block(outputs, outputs, 1), _Block(outputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        logits: Tensor = self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
        return logits


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        wide = inputs * expansion
        up: Sequence[nn.Module] = () if expansion == 1 else (*_normed(inputs, wide, 1), nn.ReLU6())
        self.conv = nn.Sequential(*up, *_normed(wide, wide, 3, stride, wide), nn.ReLU6(), *_normed(wide, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class ForgeMobileNetV2(nn.Module):
    """Half the width, strides for 32x32 images, 52 norms."""

    def __init__(self) -> None:
        super().__init__()
        width = _of_eight(32 * WIDTH)
        self.stem = nn.Sequential(*_normed(3, width, 3), nn.ReLU6())
        blocks = []
        for expansion, channels, count, stride in STAGES:
            outputs = _of_eight(channels * WIDTH)
            for i in range(count):
                blocks.append(_Inverted(width, outputs, stride if i == 0 else 1, expansion))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        last = _of_eight(1280 * WIDTH)
        self.head = nn.Sequential(*_normed(width, last, 1), nn.ReLU6())
        self.linear = nn.Linear(last, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.head(self.blocks(self.stem(x))).mean((2, 3)))
        return logits


def _of_eight(width: float) -> int:
    """The nearest multiple of eight, at least 8 and at least nine tenths of the width."""
    found = max(8, int(width + 4) // 8 * 8)
    return found + 8 if found < 0.9 * width else found


def forge_resnet20() -> nn.Module:
    return ForgeResNet20()


def forge_mobilenetv2() -> nn.Module:
    return ForgeMobileNetV2()
