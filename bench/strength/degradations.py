"""Degradations drawn at random that share no recipe and no parameter with CIFAR-10-C: what export could make of its own images.

    spectrum   a random low or high pass and coloured noise, as restyling makes them (`cloud.distil.restyle`)
    filter     a random smooth 5x5 filter
    colour     gain, offset and exponent of each channel
    light      a random smooth field of light
    augment    one or two operations of AugMix (Hendrycks et al., ICLR 2020), each alike for all images

A draw is a domain: its parameters are fixed, only its noise is fresh for every image.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.ndimage import convolve, zoom

__all__ = ["KINDS", "draw"]

U8 = NDArray[np.uint8]
F64 = NDArray[np.float64]
Degrade = Callable[[U8, np.random.Generator], U8]


def draw(kind: str, rng: np.random.Generator) -> Degrade:
    """A domain of a kind: uint8 (N, H, W, 3) and a generator for the noise, to the same shape."""
    return KINDS[kind](rng)


def _bytes(x: F64) -> U8:
    return np.clip(np.rint(x * 255), 0, 255).astype(np.uint8)


def _spectrum(rng: np.random.Generator) -> Degrade:
    low, steep, high = rng.uniform(0.06, 0.5), rng.uniform(1, 4), rng.random() < 0.25
    slope, size = rng.uniform(-1.5, 0.5), np.exp(rng.uniform(np.log(0.005), np.log(0.12)))
    tint = rng.dirichlet(np.full(3, 2.0)) * 3

    def degrade(images: U8, fresh: np.random.Generator) -> U8:
        height, width = images.shape[1:3]
        radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
        passed = 1 / (1 + (radius / low) ** steep)
        gain = (1 - 0.8 * passed if high else passed)[None, :, :, None]
        gain[:, 0, 0] = 1.0
        colour = np.maximum(radius, 1 / max(height, width)) ** slope
        colour[0, 0] = 0.0
        noise = np.fft.rfft2(fresh.standard_normal(images.shape), axes=(1, 2)) * colour[None, :, :, None]
        noise_ = np.fft.irfft2(noise, s=(height, width), axes=(1, 2))
        filtered = np.fft.irfft2(np.fft.rfft2(images / 255, axes=(1, 2)) * gain, s=(height, width), axes=(1, 2))
        return _bytes(filtered + size * np.sqrt(tint) * noise_ / noise_.std())

    return degrade


def _filter(rng: np.random.Generator) -> Degrade:
    kernel = zoom(rng.exponential(size=(3, 3)) ** 2, 5 / 3, order=1)
    kernel = rng.uniform(0.8, 1.6) * kernel / kernel.sum()
    kernel[2, 2] += 1 - kernel.sum()

    def degrade(images: U8, fresh: np.random.Generator) -> U8:
        return _bytes(convolve(images / 255, kernel[None, :, :, None], mode="nearest"))

    return degrade


def _colour(rng: np.random.Generator) -> Degrade:
    gain = np.exp(rng.normal(rng.normal(0, 0.5), 0.3, 3))
    offset, exponent = rng.normal(0, 0.2, 3), np.exp(rng.normal(0, 0.4, 3))

    def degrade(images: U8, fresh: np.random.Generator) -> U8:
        return _bytes(np.clip(gain * (images / 255) ** exponent + offset, 0, 1))

    return degrade


def _light(rng: np.random.Generator) -> Degrade:
    coarse, depth = rng.normal(size=(4, 4, 3)), rng.uniform(0.4, 1.2)

    def degrade(images: U8, fresh: np.random.Generator) -> U8:
        field = zoom(coarse, (images.shape[1] / 4, images.shape[2] / 4, 1), order=3)
        return _bytes(images / 255 * np.exp(depth * field))

    return degrade


def _augment(rng: np.random.Generator) -> Degrade:
    bits, below = int(rng.integers(1, 4)), int(rng.integers(64, 200))
    sign = -1 if rng.random() < 0.5 else 1
    angle, lean, cut = sign * rng.uniform(10, 30), sign * rng.uniform(0.2, 0.45), float(rng.uniform(0, 8))
    operations: tuple[Callable[[Image.Image], Image.Image], ...] = (
        lambda i: ImageOps.posterize(i, bits),
        lambda i: ImageOps.solarize(i, below),
        ImageOps.equalize,
        lambda i: ImageOps.autocontrast(i, cutoff=cut),
        lambda i: i.rotate(angle, Image.Resampling.BILINEAR),
        lambda i: i.transform(i.size, Image.Transform.AFFINE, (1, lean, 0, 0, 1, 0), Image.Resampling.BILINEAR),
    )
    chosen = rng.choice(len(operations), int(rng.integers(1, 3)), replace=False)

    def degrade(images: U8, fresh: np.random.Generator) -> U8:
        out = []
        for image in images:
            picture = Image.fromarray(image)
            for index in chosen:
                picture = operations[int(index)](picture)
            out.append(np.asarray(picture))
        return np.stack(out)

    return degrade


KINDS: dict[str, Callable[[np.random.Generator], Degrade]] = {
    "spectrum": _spectrum,
    "filter": _filter,
    "colour": _colour,
    "light": _light,
    "augment": _augment,
}
