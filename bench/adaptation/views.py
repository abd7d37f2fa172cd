"""A second view of a batch, as CoTTA's and ROID's consistency losses use: colours changed, turned, moved, scaled, mirrored,
blurred, with a little noise (Wang et al., CVPR 2022, section 3.2; constants of mariodoebler/test-time-adaptation @8b2ed63)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from bench.adaptation.nets import MEAN, STD

__all__ = ["second_view"]

BRIGHTNESS, CONTRAST, SATURATION, GAMMA, HUE = (0.6, 1.4), (0.7, 1.3), (0.5, 1.5), (0.7, 1.3), (-0.06, 0.06)
DEGREES, SHIFT, SCALE, NOISE, BLUR = 15.0, 1 / 16, (0.9, 1.1), 0.005, (0.001, 0.25)
GREY = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # ITU-R BT.601 luma


def second_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """Another view of normalised images.

    Args:
        x: float32 (n, 3, h, w), as `nets.to_input` makes it. The batch shares one draw of colours; each image has its own
            geometry.

    Returns:
        float32 of the same shape, normalised alike.
    """
    y = _moved(_coloured((x * STD + MEAN).clamp(0, 1), generator), generator)
    y = y + NOISE * torch.randn(y.shape, generator=generator)
    return (y.clamp(0, 1) - MEAN) / STD


def _draw(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _coloured(y: Tensor, generator: torch.Generator) -> Tensor:
    for which in torch.randperm(5, generator=generator).tolist():
        if which == 0:
            y = (y * _draw(generator, *BRIGHTNESS)).clamp(0, 1)
        elif which == 1:
            mean = (y * GREY).sum(1, keepdim=True).mean((2, 3), keepdim=True)
            y = torch.lerp(mean.expand_as(y), y, _draw(generator, *CONTRAST)).clamp(0, 1)
        elif which == 2:
            y = torch.lerp((y * GREY).sum(1, keepdim=True).expand_as(y), y, _draw(generator, *SATURATION)).clamp(0, 1)
        elif which == 3:
            y = _turned_hue(y, _draw(generator, *HUE)).clamp(0, 1)
        else:
            y = y.clamp(min=1e-8) ** _draw(generator, *GAMMA)
    return y


def _turned_hue(y: Tensor, share: float) -> Tensor:
    """Colours turned about the grey axis by `share` of a circle (Rodrigues' rotation): hue, near enough for an augmentation."""
    angle, axis = 2 * math.pi * share, 1 / math.sqrt(3)
    cross = axis * torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    matrix = math.cos(angle) * torch.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) / 3
    return torch.einsum("dc,nchw->ndhw", matrix, y)


def _moved(y: Tensor, generator: torch.Generator) -> Tensor:
    n, _, height, width = y.shape

    def each(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    angle, scale = each(-DEGREES, DEGREES).deg2rad(), each(*SCALE)
    mirrored = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    aspect = width / height
    rows = [torch.stack([mirrored * cosine, -sine / aspect, each(-2 * SHIFT, 2 * SHIFT)], 1),
            torch.stack([mirrored * sine * aspect, cosine, each(-2 * SHIFT, 2 * SHIFT)], 1)]  # fmt: skip
    grid = F.affine_grid(torch.stack(rows, 1), [n, 3, height, width], align_corners=False)
    y = F.grid_sample(y, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    deviation = _draw(generator, *BLUR)
    taps = torch.exp(-0.5 * (torch.arange(-2.0, 3.0) / deviation) ** 2)
    taps = (taps / taps.sum()).expand(3, 1, 5)
    y = F.conv2d(F.pad(y, (2, 2, 0, 0), mode="reflect"), taps.unsqueeze(2), groups=3)
    return F.conv2d(F.pad(y, (0, 0, 2, 2), mode="reflect"), taps.unsqueeze(3), groups=3)
