"""The data folder's teachers behind FORGE's normalisation: they were trained with ImageNet's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.adaptation.rows import weights
from bench.field.networks import FORGE, IMAGENET
from cloud.distil import DistilSettings, Teacher, Teachers
from demo.models import load_npz, resnet44, resnet56
from refold.preprocess import Preprocess

__all__ = ["Renormalised", "forge_teachers"]


class Renormalised(nn.Module):
    """Takes input normalised as FORGE does, hands it on normalised as the network wants it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        theirs, ours = (_constants(n) for n in (FORGE, IMAGENET))
        self.scale, self.offset = theirs[1] / ours[1], (theirs[0] - ours[0]) / ours[1]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x * self.scale + self.offset)
        return logits


def forge_teachers(preprocess: Preprocess, settings: DistilSettings) -> Teachers:
    """ResNet-56 fine-tuned with AugMix and ResNet-44, in evaluation mode, on images preprocessed for FORGE's networks."""
    named = (("resnet56_augmix_cifar10", resnet56), ("resnet44_cifar10", resnet44))
    networks = [(name, Renormalised(load_npz(make(), weights(f"{name}.npz")).eval())) for name, make in named]
    return Teachers([Teacher(name, network) for name, network in networks], preprocess, settings)


def _constants(normalisation: dict[str, Any]) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(normalisation[role]).view(1, 3, 1, 1) for role in ("mean", "std"))
    return mean, std
