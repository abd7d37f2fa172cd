"""The fifteen corruptions of CIFAR-10-C, made from clean pictures, and the streams the benchmarks run on.

Recipe: Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
with the severities of its CIFAR variant, which are much milder than ImageNet-C's. One thing differs: the frost pictures cannot
be shipped, so frost is drawn procedurally (`bench.corrupt.weather.frost_texture`). `python -m bench corruptions` measures how
close the result is to a re-generation with the authors' own code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.corrupt import blur, digital, noise, weather
from refold.errors import InputError, UsageError

__all__ = ["NAMES", "SEVERITIES", "corrupt"]

U8 = NDArray[np.uint8]
SEVERITIES = (1, 2, 3, 4, 5)
CHUNK = 250  # pictures per generator: bounds memory, and a stream's first chunks do not depend on its length

# name -> function, and its parameters at severities 1 to 5
RECIPES: dict[str, tuple[Callable[..., U8], tuple[tuple[Any, ...], ...]]] = {
    "gaussian_noise": (noise.gaussian, ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,))),
    "shot_noise": (noise.shot, ((500,), (250,), (100,), (75,), (50,))),
    "impulse_noise": (noise.impulse, ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,))),
    "defocus_blur": (blur.defocus, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))),
    "glass_blur": (blur.glass, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": (blur.motion, ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))),
    "zoom_blur": (blur.zoom, ((1.06,), (1.11,), (1.16,), (1.21,), (1.26,))),
    "snow": (
        weather.snow,
        (
            (0.1, 0.2, 1.0, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1.0, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (weather.frost, ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (weather.fog, ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))),
    "brightness": (weather.brightness, ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,))),
    "contrast": (digital.contrast, ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,))),
    "elastic_transform": (
        digital.elastic,
        ((0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (digital.pixelate, ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,))),
    "jpeg_compression": (digital.jpeg, ((80,), (65,), (58,), (50,), (40,))),
}
NAMES = tuple(RECIPES)  # the benchmark's order, also that of a continual stream


def corrupt(name: str, severity: int, images: U8, seed: int = 0) -> U8:
    """The pictures as the named corruption leaves them. Deterministic: the same arguments give the same bytes.

    Args:
        name: one of `NAMES`, or "clean", which returns the pictures unchanged.
        severity: 1 (mild) to 5.
        images: uint8 (N, H, W, 3) RGB; square, and for fog and frost with a side that is a power of two.

    Returns:
        uint8, same shape.

    Raises:
        UsageError: no such corruption or severity.
        InputError: not a batch of square RGB pictures.
    """
    if name != "clean" and name not in RECIPES:
        raise UsageError(f"There is no corruption {name!r}; there are clean, {', '.join(NAMES)}.")
    if severity not in SEVERITIES:
        raise UsageError(f"There is no severity {severity!r}; there are 1 to 5.")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise InputError(f"Corruptions need uint8 pictures (N, side, side, 3), not {images.dtype} {images.shape}.")
    if name == "clean" or not len(images):
        return np.array(images)
    side = images.shape[1]
    if name in ("fog", "frost") and side & (side - 1):
        raise InputError(f"{name} needs pictures whose side is a power of two, not {side}.")
    function, parameters = RECIPES[name]
    key = int.from_bytes(hashlib.sha256(f"{name} {severity} {seed}".encode()).digest()[:16], "little")
    chunks = [images[i : i + CHUNK] for i in range(0, len(images), CHUNK)]
    made = [function(c, np.random.default_rng([key, i]), *parameters[severity - 1]) for i, c in enumerate(chunks)]
    return np.ascontiguousarray(np.concatenate(made))
