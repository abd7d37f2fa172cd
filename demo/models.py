"""The CIFAR-10 networks of the demo, the benchmarks and the tests, and how to fill them from plain `.npz` files.

ResNet-20/44/56: He et al. 2016, section 4.2, with parameter-free shortcuts (option A). ResNet-8: MLPerf Tiny's Keras model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from refold.errors import InputError

__all__ = [
    "BasicBlock",
    "CifarResNet",
    "ResNet8",
    "digits_student",
    "digits_teacher",
    "load_npz",
    "resnet8",
    "resnet20",
    "resnet44",
    "resnet56",
    "save_npz",
]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the width doubles, every second pixel with zero channels on each side."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.pad = (width - inputs) // 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.pad or self.stride > 1:
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return torch.relu(y + x)


class CifarResNet(nn.Module):
    """6n + 2 layers, widths 16, 32, 64; input (N, 3, 32, 32), normalised; output (N, classes) logits."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, width, stride)
        return nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def resnet20() -> CifarResNet:
    return CifarResNet(3).eval()


def resnet44() -> CifarResNet:
    return CifarResNet(7).eval()


def resnet56() -> CifarResNet:
    return CifarResNet(9).eval()


def digits_student() -> CifarResNet:
    """ResNet-8 of the paper's family: what the demo runs on scikit-learn's digits."""
    return CifarResNet(1).eval()


def digits_teacher() -> CifarResNet:
    return CifarResNet(2).eval()


class ResNet8(nn.Module):
    """MLPerf Tiny image classification; input (N, 3, 32, 32) in 0..255. Strided 3x3 convolutions pad right and bottom only."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        shapes = [(3, 16, 3, 1), (16, 16, 3, 1), (16, 16, 3, 1), (16, 32, 3, 2), (32, 32, 3, 1), (16, 32, 1, 2)]
        shapes += [(32, 64, 3, 2), (64, 64, 3, 1), (32, 64, 1, 2)]
        for i, (inputs, width, kernel, stride) in enumerate(shapes):
            pad = 1 if kernel == 3 and stride == 1 else 0
            setattr(self, f"conv2d{f'_{i}' if i else ''}", nn.Conv2d(inputs, width, kernel, stride, pad))
        for i, width in enumerate((16, 16, 16, 32, 32, 64, 64)):
            setattr(self, f"batch_normalization{f'_{i}' if i else ''}", nn.BatchNorm2d(width, eps=1e-3))
        self.dense = nn.Linear(64, classes)

    def _layer(self, name: str, x: Tensor) -> Tensor:
        y: Tensor = self.get_submodule(name)(x)
        return y

    def _norm(self, i: int, conv: int, x: Tensor) -> Tensor:
        y = self._layer(f"conv2d{f'_{conv}' if conv else ''}", x)
        return self._layer(f"batch_normalization{f'_{i}' if i else ''}", y)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self._norm(0, 0, x))
        x = torch.relu(self._norm(2, 2, torch.relu(self._norm(1, 1, x))) + x)
        y = torch.relu(self._norm(3, 3, nn.functional.pad(x, (0, 1, 0, 1))))
        x = torch.relu(self._norm(4, 4, y) + self._layer("conv2d_5", x))
        y = torch.relu(self._norm(5, 6, nn.functional.pad(x, (0, 1, 0, 1))))
        x = torch.relu(self._norm(6, 7, y) + self._layer("conv2d_8", x))
        return self._layer("dense", x.mean((2, 3)))


def resnet8() -> ResNet8:
    return ResNet8().eval()


_KERAS = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "kernel": "weight",
}


def load_npz(module: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Fills every parameter and running statistic of `module` from an `.npz` of arrays named like its state dict.

    Keras names (gamma, moving_mean, kernel, ...) are understood. Raises InputError when a name or shape does not fit.
    """
    try:
        with np.load(Path(path), allow_pickle=False) as z:
            arrays = {k: z[k] for k in z.files}
    except (OSError, ValueError) as e:
        raise InputError(f"The weights {path} cannot be read: {e}.") from e
    state = module.state_dict()
    found = {}
    for name, array in arrays.items():
        stem, _, leaf = name.rpartition(".")
        found[f"{stem}.{_KERAS.get(leaf, leaf)}"] = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in found or found[name].shape != tensor.shape:
            raise InputError(f"The weights {path} do not fit the network at {name}.")
        state[name] = found[name]
    module.load_state_dict(state)
    return module


def save_npz(module: nn.Module, path: str | os.PathLike[str]) -> None:
    arrays = {k: v.numpy() for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    np.savez_compressed(Path(path), **arrays)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "digits_student": digits_student,
    "digits_teacher": digits_teacher,
}
