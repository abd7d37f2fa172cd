"""The two augmentations every training here uses: mirror images and small moves. Seeded by the caller's generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["flip_and_move"]


def flip_and_move(pictures: Tensor, generator: torch.Generator, share: float = 0.125) -> Tensor:
    """Mirrors half of the pictures, (N, C, H, W), and moves all by up to `share` of their side, reflecting at the border."""
    n, _, h, w = pictures.shape
    mirrored = torch.rand(n, generator=generator) < 0.5
    pictures = torch.where(mirrored.view(-1, 1, 1, 1), pictures.flip(3), pictures)
    dy, dx = max(int(h * share), 1), max(int(w * share), 1)
    if min(h, w) <= max(dy, dx):
        return pictures
    padded = nn.functional.pad(pictures, (dx, dx, dy, dy), mode="reflect")
    top = int(torch.randint(0, 2 * dy + 1, (1,), generator=generator))
    left = int(torch.randint(0, 2 * dx + 1, (1,), generator=generator))
    return padded[:, :, top : top + h, left : left + w]
