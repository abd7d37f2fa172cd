"""What several corruptions share: full-scale conversion, sampling between pixels, and a camera's directional blur."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["F64", "U8", "bilinear", "reflect", "to_u8", "unit", "wand_motion_blur", "zoom_matrix"]

F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]


def unit(images: U8) -> F64:
    """0..255 to 0..1."""
    return images / 255.0


def to_u8(x: F64) -> U8:
    """0..1 to uint8. Truncates, as the published files were made; a rounding generator is brighter by half a step."""
    return (np.clip(x, 0, 1) * 255).astype(np.uint8)


def reflect(i: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Indices outside 0..size-1 mirrored about the edge pixels' centres (… 2 1 0 1 2 …)."""
    period = 2 * size - 2
    i = np.abs(i) % period
    return np.where(i >= size, period - i, i)


def bilinear(x: F64, rows: F64, columns: F64) -> F64:
    """Samples (N, H, W, C) at the fractional places (N, H, W) each; mirrored outside."""
    h, w = x.shape[1:3]
    top, left = np.floor(rows).astype(np.int64), np.floor(columns).astype(np.int64)
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    n = np.arange(len(x))[:, None, None]
    r0, r1, c0, c1 = reflect(top, h), reflect(top + 1, h), reflect(left, w), reflect(left + 1, w)
    above = x[n, r0, c0] * (1 - right) + x[n, r0, c1] * right
    below = x[n, r1, c0] * (1 - right) + x[n, r1, c1] * right
    sampled: F64 = above * (1 - down) + below * down
    return sampled


def zoom_matrix(size: int, factor: float) -> F64:
    """The linear map (size, size) that crops the middle 1/factor of a line and stretches it back to its length."""
    kept = int(np.ceil(size / factor))
    start = (size - kept) // 2
    stretched = ndimage.zoom(np.eye(kept), (factor, 1), order=1)
    trim = (len(stretched) - size) // 2
    matrix = np.zeros((size, size))
    matrix[:, start : start + kept] = stretched[trim : trim + size]
    return matrix


def wand_motion_blur(x: F64, radius: int, sigma: float, degrees: F64) -> F64:
    """ImageMagick's motion blur: a one-sided Gaussian smear, each picture of (N, H, W, C) along its own angle.

    The kernel has 2 * radius + 1 whole-pixel offsets; beyond the border the edge pixel repeats.
    """
    n, h, w = x.shape[:3]
    taps = np.arange(2 * radius + 1)
    kernel = np.exp(-(taps**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    angle = np.deg2rad(degrees)[:, None]
    across = np.ceil(taps * np.cos(angle) - 0.5).astype(np.int64)
    down = np.ceil(taps * np.sin(angle) - 0.5).astype(np.int64)
    index = np.arange(n)[:, None, None]
    out = np.zeros_like(x)
    for i, weight in enumerate(kernel):
        rows = np.clip(np.arange(h) + down[:, i, None], 0, h - 1)[:, :, None]
        columns = np.clip(np.arange(w) + across[:, i, None], 0, w - 1)[:, None, :]
        out += weight * x[index, rows, columns]
    return out
