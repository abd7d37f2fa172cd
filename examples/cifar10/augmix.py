"""AugMix for a batch on any device, with geometric and tonal operations only: none of the benchmark's corruptions.

Hendrycks et al. 2020, "AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty", section 3: a few
chains of random operations, mixed by Dirichlet weights and then with the original by a Beta weight. Left out on purpose,
because CIFAR-10-C tests them: noise, blur, weather, brightness, contrast, elastic distortion, pixelation, JPEG; and also
colour and sharpness.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["OPERATIONS", "augmix", "crop_and_flip"]

CHAINS = 3
MOST_STEPS = 3
SEVERITY = 0.3  # fraction of each operation's range, as AugMix's severity 3 of 10


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """The usual augmentation: mirrored with probability 1/2, shifted by up to 4 pixels over black; uint8 (N, 3, H, W)."""
    n, _, height, width = images.shape
    padded = functional.pad(images, (4, 4, 4, 4))
    dy, dx = torch.randint(0, 9, (2, n, 1), generator=generator)
    columns = dx + torch.arange(width)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns).to(images.device)
    rows = (dy + torch.arange(height)).to(images.device)
    index = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def augmix(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mixes each picture with chains of operations on itself.

    Args:
        images: float (N, 3, H, W) in 0..255.
        generator: on the CPU, so that a seed means the same on every machine.

    Returns:
        float (N, 3, H, W) in 0..255.
    """
    n = images.shape[0]
    exponential = -torch.rand(CHAINS, n, generator=generator).clamp_min(1e-9).log()
    weights = (exponential / exponential.sum(0)).to(images.device)  # Dirichlet(1, ..., 1)
    keep = torch.rand(n, generator=generator).to(images.device)[:, None, None, None]  # Beta(1, 1)
    mixed = torch.zeros_like(images)
    for chain in range(CHAINS):
        x = images
        steps = torch.randint(1, MOST_STEPS + 1, (n,), generator=generator)
        for step in range(MOST_STEPS):
            choice = torch.randint(len(OPERATIONS), (n,), generator=generator)
            choice[steps <= step] = -1
            out = x.clone()
            for number, operation in enumerate(OPERATIONS):
                chosen = (choice == number).nonzero().flatten()
                if len(chosen):
                    size = SEVERITY * torch.rand(len(chosen), generator=generator) * 0.9 + 0.1 * SEVERITY
                    sign = torch.randint(0, 2, (len(chosen),), generator=generator) * 2 - 1
                    chosen = chosen.to(x.device)
                    out[chosen] = operation(x[chosen], (size * sign).to(x.device))
            x = out
        mixed += weights[chain][:, None, None, None] * x
    return keep * images + (1 - keep) * mixed


def _affine(images: Tensor, matrix: Tensor) -> Tensor:
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, "bilinear", "zeros", align_corners=False)


def _matrix(size: Tensor, row: int, column: int, reach: float) -> Tensor:
    matrix = torch.eye(2, 3, device=size.device).repeat(len(size), 1, 1)
    matrix[:, row, column] += size * reach
    return matrix


def _rotate(x: Tensor, size: Tensor) -> Tensor:
    angle = size * (torch.pi / 6)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return _affine(x, torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1))


def _posterize(x: Tensor, size: Tensor) -> Tensor:
    dropped = (size.abs() * 4 / SEVERITY).round().clamp(1, 4)[:, None, None, None]
    step = 2.0**dropped
    return (x / step).floor() * step


def _solarize(x: Tensor, size: Tensor) -> Tensor:
    threshold = 256 * (1 - size.abs())[:, None, None, None]
    return torch.where(x < threshold, x, 255 - x)


def _autocontrast(x: Tensor, size: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) * 255 / (high - low).clamp_min(1), x)


def _equalize(x: Tensor, size: Tensor) -> Tensor:
    flat = x.flatten(2).round().clamp(0, 255).long()
    counts = torch.zeros(*flat.shape[:2], 256, device=x.device).scatter_add_(2, flat, torch.ones_like(flat, dtype=x.dtype))
    rank = (counts.cumsum(2) - counts[..., :1]) / (flat.shape[2] - counts[..., :1]).clamp_min(1)
    return (rank.gather(2, flat) * 255).view_as(x)


OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    _rotate,
    lambda x, size: _affine(x, _matrix(size, 0, 1, 1.0)),  # shear
    lambda x, size: _affine(x, _matrix(size, 1, 0, 1.0)),
    lambda x, size: _affine(x, _matrix(size, 0, 2, 2 / 3)),  # translate: a third of the side at full severity
    lambda x, size: _affine(x, _matrix(size, 1, 2, 2 / 3)),
    _posterize,
    _solarize,
    _autocontrast,
    _equalize,
)
