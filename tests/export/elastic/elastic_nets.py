"""A small residual net trained on scikit-learn's digits, as files: what the tests of an elastic training start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn

from refold.preprocess import Preprocess

SIZE, CLASSES = 16, 10
PREPROCESS = Preprocess(SIZE, SIZE, 1 / 255, (0.3, 0.3, 0.3), (0.4, 0.4, 0.4))
PREPROCESS_TEXT = "16x16,mean=0.3,std=0.4"

MODEL = f"{Path(__file__)}:net"  # as the command line names it


class Net(nn.Module):
    """Six integer layers, two of them around a shortcut; a pooled map before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
        self.c = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.d = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.b(self.a(x)) + x)
        logits: Tensor = self.head(self.d(self.c(x)).mean((2, 3)))
        return logits


def net() -> nn.Module:
    """For the command line: `elastic_nets.py:net`."""
    torch.manual_seed(0)
    return Net().eval()


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """uint8 (1797, 16, 16, 3) and labels."""
    found = load_digits()
    grey = (np.asarray(found.images) * (255 / 16)).astype(np.uint8)
    images = np.repeat(np.repeat(grey, 2, 1), 2, 2)[..., None].repeat(3, 3)
    return np.ascontiguousarray(images), np.asarray(found.target, np.int64)


def trained(epochs: int = 4) -> nn.Module:
    """On the first 1,200 digits; the same numbers every time."""
    model, (images, labels) = net().train(), digits()
    x, y = torch.from_numpy(PREPROCESS.apply(images[:1200])), torch.from_numpy(labels[:1200])
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(60):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimiser.step()
    return model.eval()


def write_files(folder: Path) -> tuple[Path, Path]:
    """(weights, pictures): a trained net's state dict, and the first 1,200 digits as npz."""
    weights, pictures = folder / "weights.npz", folder / "digits.npz"
    state = trained().state_dict()
    np.savez(weights, **{k: v.numpy() for k, v in state.items() if not k.endswith("tracked")})
    images, labels = digits()
    np.savez(pictures, images=images[:1200], labels=labels[:1200])
    return weights, pictures
