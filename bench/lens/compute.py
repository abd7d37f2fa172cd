"""What a candidate costs a network: numbers that a release would carry, and multiply-adds for each image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.lens.candidates import RANK, SIDE
from bench.models import EfficientNetLite0
from demo.models import resnet20

__all__ = ["NETS", "Cost", "cost", "layers"]

NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {"ResNet-20": (resnet20, 32), "Lite0": (EfficientNetLite0, 224)}
CHANNELS = 3


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer: channels in and out, groups, pixels of its output, multiply-adds."""

    inputs: int
    outputs: int
    groups: int
    pixels: int
    multiply_adds: int
    convolution: bool


@dataclass(frozen=True)
class Cost:
    """numbers: that learn. share: multiply-adds added to one image's, in %."""

    numbers: int
    share: float


def layers(net: nn.Module, side: int) -> list[Layer]:
    """Every convolution and linear layer that an image (1, 3, side, side) runs through; on the meta device nothing is
    computed."""
    found: list[Layer] = []

    def seen(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            pixels = output.shape[2] * output.shape[3]
            each = module.weight[0].numel()
            sizes = (module.in_channels, module.out_channels, module.groups, pixels)
            found.append(Layer(*sizes, each * module.out_channels * pixels, True))
        elif isinstance(module, nn.Linear):
            found.append(Layer(module.in_features, module.out_features, 1, 1, module.weight.numel(), False))

    hooks = [m.register_forward_hook(seen) for m in net.modules()]
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, CHANNELS, side, side, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def cost(candidate: str, name: str) -> Cost:
    """Of a candidate on one of `NETS`."""
    make, side = NETS[name]
    with torch.device("meta"):
        net = make()
    known = layers(net, side)
    total = sum(layer.multiply_adds for layer in known)
    if candidate == "lens":
        kernel = CHANNELS * SIDE * SIDE
        return Cost(kernel + CHANNELS, round(100 * kernel * side * side / total, 3))
    beside = [layer for layer in known if layer.convolution and layer.groups == 1]
    numbers = sum(RANK * (layer.inputs + layer.outputs) for layer in beside)
    added = sum(RANK * (layer.inputs + layer.outputs) * layer.pixels for layer in beside)
    return Cost(numbers, round(100 * added / total, 3))
