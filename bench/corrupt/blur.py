"""Blur: out of focus, behind ribbed glass, in motion, while zooming."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from bench.corrupt.pixels import F64, U8, to_u8, unit, wand_motion_blur, zoom_matrix

__all__ = ["defocus", "glass", "motion", "zoom"]


def disk(radius: float, alias_blur: float) -> F64:
    """A 17x17 disk of the radius, sum 1, softened by a 3x3 Gaussian of sigma `alias_blur`."""
    line = np.arange(-8, 9)
    shape = (line[:, None] ** 2 + line[None, :] ** 2 <= radius**2).astype(np.float64)
    edge = np.exp(-(np.array([-1.0, 0.0, 1.0]) ** 2) / (2 * alias_blur**2))
    edge /= edge.sum()
    softened: F64 = ndimage.convolve(shape / shape.sum(), np.outer(edge, edge), mode="mirror")
    return softened


def defocus(images: U8, rng: np.random.Generator, radius: float, alias_blur: float) -> U8:
    return to_u8(ndimage.correlate(unit(images), disk(radius, alias_blur)[None, :, :, None], mode="mirror"))


def glass(images: U8, rng: np.random.Generator, sigma: float, reach: int, rounds: int) -> U8:
    """Blur, let every pixel take the colour of one up to `reach` above and to the left, blur again.

    The published generator means to swap the two pixels, but its arrays are views, so it copies; walking up from the far
    corner, a copied pixel is always one not yet written, which makes each round one gather.
    """
    side = images.shape[1]
    x = to_u8(_gaussian(unit(images), sigma))
    n = np.arange(len(x))[:, None, None]
    inner = np.arange(reach + 1, side - reach + 1)
    for _ in range(rounds):
        shift = rng.integers(-reach, reach, (2, len(x), len(inner), len(inner)))
        rows, columns = inner[:, None] + shift[0], inner[None, :] + shift[1]
        moved = x.copy()
        moved[:, inner[0] : inner[-1] + 1, inner[0] : inner[-1] + 1] = x[n, rows, columns]
        x = moved
    return to_u8(_gaussian(unit(x), sigma))


def _gaussian(x: F64, sigma: float) -> F64:
    smooth: F64 = ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest", truncate=4.0)
    return smooth


def motion(images: U8, rng: np.random.Generator, radius: int, sigma: float) -> U8:
    angles = rng.uniform(-45, 45, len(images))
    return to_u8(wand_motion_blur(unit(images), radius, sigma, angles))


def zoom(images: U8, rng: np.random.Generator, end: float) -> U8:
    """Mean of the picture and of its zooms by 1, 1.01, ... below `end`."""
    x = unit(images)
    factors = np.arange(1, end, 0.01)
    total = x.copy()
    for factor in factors:
        m = zoom_matrix(images.shape[1], factor)
        total += np.einsum("ri,nijc,sj->nrsc", m, x, m, optimize=True)
    return to_u8(total / (len(factors) + 1))
