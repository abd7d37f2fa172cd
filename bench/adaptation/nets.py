"""Networks as test-time adaptation methods see them: every BatchNorm replaced by one that can normalise four ways."""

from __future__ import annotations

import copy
from enum import Enum
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own short name

from refold.errors import ModelError

__all__ = ["AdaptableNorm", "Statistics", "adaptable", "affine_parameters", "entropy", "norms", "to_input"]

Net = TypeVar("Net", bound=nn.Module)
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


class Statistics(Enum):
    """Where the mean and variance of a normalisation come from."""

    SOURCE = "source"  # the training set
    BATCH = "batch"  # the batch at hand (prediction-time batch norm; Schneider et al. 2020, Nado et al. 2020)
    MIXED = "mixed"  # (1 - alpha) source + alpha batch (alpha-BN; You et al. 2021)
    RENORM = "renorm"  # test-time batch renormalisation (DELTA, Zhao et al. 2023), as CEMA's released code uses it


class AdaptableNorm(nn.Module):
    """A BatchNorm2d whose statistics follow `statistics`; gamma and beta are `weight` and `bias`.

    RENORM: the value is (x - running mean) / running deviation; the gradient is that of batch normalisation. Running statistics
    start from the first batch seen in either mode (the source's are thrown away, as in the released code), and move by 0.1 in
    train mode only.
    """

    momentum = 0.1

    def __init__(self, norm: nn.BatchNorm2d, statistics: Statistics, alpha: float = 1.0) -> None:
        super().__init__()
        if norm.running_mean is None or norm.running_var is None or norm.weight is None:
            raise ModelError("A BatchNorm without statistics or affine parameters cannot be adapted by these methods.")
        self.weight = nn.Parameter(norm.weight.detach().clone())
        self.bias = nn.Parameter(norm.bias.detach().clone())
        self.register_buffer("running_mean", norm.running_mean.detach().clone())
        self.register_buffer("running_var", norm.running_var.detach().clone())
        self.running_mean: Tensor
        self.running_var: Tensor
        self.eps, self.statistics, self.alpha = norm.eps, statistics, alpha
        self.seeded = False

    def forward(self, x: Tensor) -> Tensor:
        if self.statistics is Statistics.BATCH:
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        mean, variance = self.running_mean, self.running_var
        if self.statistics is Statistics.MIXED:
            observed, spread = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            mean = (1 - self.alpha) * mean + self.alpha * observed
            variance = (1 - self.alpha) * variance + self.alpha * spread
            if torch.is_grad_enabled():  # torch's own has no gradient with respect to given statistics
                scale = self.weight * torch.rsqrt(variance + self.eps)
                y: Tensor = x * scale.view(1, -1, 1, 1) + (self.bias - mean * scale).view(1, -1, 1, 1)
                return y
        elif self.statistics is Statistics.RENORM:
            return self._renorm(x)
        return F.batch_norm(x, mean, variance, self.weight, self.bias, False, 0.0, self.eps)

    def _renorm(self, x: Tensor) -> Tensor:
        if not self.seeded or self.training:
            mean, variance = x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3), unbiased=False)
            if not self.seeded:
                self.running_mean, self.running_var, self.seeded = mean.clone(), variance.clone(), True
        running = torch.sqrt(self.running_var + self.eps)
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        normal = F.batch_norm(x, None, None, None, None, True, 0.0, self.eps)
        r = (torch.sqrt(variance + self.eps) / running).view(1, -1, 1, 1)
        d = ((mean - self.running_mean) / running).view(1, -1, 1, 1)
        y: Tensor = (normal * r + d) * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        self.running_mean = torch.lerp(self.running_mean, mean, self.momentum)
        self.running_var = torch.lerp(self.running_var, variance, self.momentum)
        return y


def adaptable(net: Net, statistics: Statistics, alpha: float = 1.0) -> Net:
    """A copy of `net` with every BatchNorm2d made adaptable, and nothing but their affine parameters trainable.

    Its tensors lie channels last, which is a quarter faster here and changes nothing else.
    """
    net = copy.deepcopy(net).requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent = net.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], AdaptableNorm(module, statistics, alpha))
    if not norms(net):
        raise ModelError("The network has no BatchNorm2d: these methods have nothing to adapt.")
    return net.eval()


def norms(net: nn.Module) -> list[AdaptableNorm]:
    return [m for m in net.modules() if isinstance(m, AdaptableNorm)]


def affine_parameters(net: nn.Module) -> list[nn.Parameter]:
    """Every gamma and beta, in module order."""
    return [p for m in norms(net) for p in (m.weight, m.bias)]


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax in nats, one per row."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def to_input(images: NDArray[np.uint8]) -> Tensor:
    """uint8 (N, H, W, 3) → what the data folder's CIFAR networks take: float32 (N, 3, H, W), ImageNet mean and deviation."""
    return (torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
