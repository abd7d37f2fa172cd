"""What one frame says about its domain, from pixels alone: no model, no dependence on what is served.

Means tell brightness and colour, the spread tells contrast, and the energies of differences at several distances tell
noise, blur, blocks and stripes. Ratios of energies vary far less between pictures of one domain than the energies
themselves; the full covariance measured on the calibration slice makes use of that without anyone choosing weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEATURES", "FrameFeatures", "Reference"]

F64 = NDArray[np.float64]
FEATURES = 9
SIDE = 64  # pixels per side looked at; a larger picture is cut to its middle, not shrunk: shrinking would hide noise and blur
GREY = np.full(3, 1 / 3, np.float32)
QUIET = 0.05  # grey levels squared: added to energies so that a flat picture has a logarithm


@dataclass(eq=False)
class FrameFeatures:
    """Shift features of one frame; the pixels are looked at only when `values` is asked for.

    Attributes:
        image: uint8 (H, W, 3).
        entropy: nats, of the served prediction.
        predicted: class index.
    """

    image: NDArray[np.uint8]
    entropy: float
    predicted: int

    @classmethod
    def of(cls, image: NDArray[np.uint8], probabilities: NDArray[np.floating]) -> FrameFeatures:
        """From a picture, uint8 (H, W, 3), and its served probabilities, (C,)."""
        p = np.maximum(probabilities, 1e-12)
        return cls(image, float(-(p @ np.log(p))), int(probabilities.argmax()))

    @cached_property
    def values(self) -> F64:
        """float64 (FEATURES,)."""
        return image_features(self.image)


def image_features(image: NDArray[np.uint8]) -> F64:
    """The FEATURES numbers of one picture, uint8 (H, W, 3)."""
    h, w = image.shape[:2]
    if h > SIDE or w > SIDE:
        top, left = max((h - SIDE) // 2, 0), max((w - SIDE) // 2, 0)
        image = image[top : top + SIDE, left : left + SIDE]
    height, width = image.shape[:2]
    flat = image.reshape(-1, 3).astype(np.float32)
    mean = np.ones(len(flat), np.float32) @ flat / len(flat)  # products, not reductions: several times faster at this size
    grey = (flat @ GREY).reshape(height, width)
    g = grey - mean.mean()
    energies = (
        _energy(g),
        _energy(g[:, 1:] - g[:, :-1]),
        _energy(g[1:] - g[:-1]),
        _energy(g[:, 2:] - g[:, :-2]),
        _energy(g[:, 2:] - 2 * g[:, 1:-1] + g[:, :-2]),
        _energy(g[1:, 1:] - g[1:, :-1] - g[:-1, 1:] + g[:-1, :-1]),
    )
    spread, across, down, far, bend, cross = np.log(np.array(energies, np.float64) + QUIET)
    return np.array(
        [
            mean[0] / 64,
            mean[1] / 64,
            mean[2] / 64,
            spread,
            across - spread,
            down - across,
            far - across,
            bend - across,
            cross - across,
        ],
        np.float64,
    )


def _energy(difference: NDArray[np.float32]) -> float:
    flat = difference.ravel()
    return float(flat @ flat) / max(flat.size, 1)


@dataclass(frozen=True, eq=False)
class Reference:
    """How features look in the domain a bundle was exported for.

    Attributes:
        mean: float64 (FEATURES,).
        precision: float64 (FEATURES, FEATURES), inverse covariance between single frames.
        frames: pictures it was measured on.
    """

    mean: F64
    precision: F64
    frames: int

    @classmethod
    def measure(cls, images: NDArray[np.uint8]) -> Reference:
        """From the calibration slice, uint8 (N, H, W, 3); N of 32 or more gives a covariance worth its name."""
        return cls.of(np.stack([image_features(image) for image in images]))

    @classmethod
    def of(cls, values: F64) -> Reference:
        """From features, float64 (N, FEATURES)."""
        n = values.shape[0]
        mean = values.mean(0)
        centred = values - mean
        covariance = centred.T @ centred / max(n - 1, 1)
        floor = 1e-3 + np.diag(covariance) * (0.02 + 4.0 / max(n, 1))
        return cls(mean, np.linalg.inv(covariance + np.diag(floor)), n)

    def distance(self, a: F64, b: F64) -> float:
        """Squared Mahalanobis distance per feature: 1 is what two single frames of one domain differ by, halved."""
        d = a - b
        return float(d @ self.precision @ d) / FEATURES
