"""What happens to the demo's pictures: clean days, fog and sensor noise, at CIFAR-10-C's severities; numpy only.

The recipes are those of CIFAR-10-C (Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations"); `bench/corrupt` has all fifteen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refold.errors import UsageError

__all__ = ["SEVERE", "WEATHERS", "Climate", "fog", "gaussian_noise", "plasma", "weather"]

U8 = NDArray[np.uint8]
WEATHERS = ("clean", "fog", "noise")
FOG = {1: (0.2, 3.0), 2: (0.5, 3.0), 3: (0.75, 2.5), 4: (1.0, 2.0), 5: (1.5, 1.75)}  # thickness, decay of detail
NOISE = {1: 0.04, 2: 0.06, 3: 0.08, 4: 0.09, 5: 0.10}  # sigma, of 1


@dataclass(frozen=True)
class Climate:
    """How bad it gets: fog as (thickness, decay of detail), noise as sigma of full scale 1."""

    fog: tuple[float, float]
    noise: float

    @classmethod
    def of_severity(cls, severity: int) -> Climate:
        """CIFAR-10-C's severities 1 to 5."""
        if severity not in FOG:
            raise UsageError(f"There is no severity {severity}: 1 to 5.")
        return cls(FOG[severity], NOISE[severity])


SEVERE = Climate.of_severity(5)


def weather(name: str, images: U8, rng: np.random.Generator, climate: Climate = SEVERE) -> U8:
    """uint8 (N, H, W, 3) as they look in the named weather, "clean" unchanged. Fog needs squares, the side a power of two."""
    if name == "clean":
        return images
    if name not in WEATHERS:
        raise UsageError(f"There is no weather {name!r}: {', '.join(WEATHERS)}.")
    return fog(images, rng, *climate.fog) if name == "fog" else gaussian_noise(images, rng, climate.noise)


def gaussian_noise(images: U8, rng: np.random.Generator, sigma: float) -> U8:
    """Independent noise of `sigma` (full scale 1) on every channel of every pixel."""
    noisy = images / np.float32(255) + rng.normal(0, sigma, images.shape).astype(np.float32)
    return _to_u8(noisy)


def fog(images: U8, rng: np.random.Generator, thickness: float, decay: float) -> U8:
    """Adds a plasma cloud to each picture and darkens it so that its brightest value stays what it was."""
    n, side = images.shape[:2]
    x = images / np.float32(255)
    brightest = x.max((1, 2, 3), keepdims=True)
    clouded = x + np.float32(thickness) * plasma(n, side, decay, rng)[..., None]
    return _to_u8(clouded * (brightest / (brightest + np.float32(thickness))))


def plasma(count: int, side: int, decay: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Diamond-square height maps on a torus, scaled to 0..1; float32 (count, side, side), side a power of two.

    A midpoint is the mean of its four neighbours plus uniform noise of +-w^2, where w starts at 100 and is divided by `decay`
    whenever the grid is halved: the benchmark's generator squares it, and its severities mean this.
    """
    height = np.zeros((count, side, side))
    step, w = side, 100.0

    def around(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        total: NDArray[np.float64] = a + b
        return total / 4 + w * rng.uniform(-w, w, total.shape)

    while step >= 2:
        half = step // 2
        corner = height[:, ::step, ::step]
        pair = corner + np.roll(corner, -1, 1)
        height[:, half::step, half::step] = around(pair, np.roll(pair, -1, 2))
        centre, corner = height[:, half::step, half::step], height[:, ::step, ::step]
        height[:, ::step, half::step] = around(centre + np.roll(centre, 1, 1), corner + np.roll(corner, -1, 2))
        height[:, half::step, ::step] = around(centre + np.roll(centre, 1, 2), corner + np.roll(corner, -1, 1))
        step, w = half, w / decay
    height -= height.min((1, 2), keepdims=True)
    scaled: NDArray[np.float32] = (height / np.maximum(height.max((1, 2), keepdims=True), 1e-12)).astype(np.float32)
    return scaled


def _to_u8(values: NDArray[np.float32]) -> U8:
    codes: U8 = (np.clip(values, 0, 1) * 255).astype(np.uint8)
    return codes
