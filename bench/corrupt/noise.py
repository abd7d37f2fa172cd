"""Noise: of the sensor, of counting photons, and of dead pixels."""

from __future__ import annotations

import numpy as np

from bench.corrupt.pixels import U8, to_u8, unit

__all__ = ["gaussian", "impulse", "shot"]


def gaussian(images: U8, rng: np.random.Generator, sigma: float) -> U8:
    return to_u8(unit(images) + rng.normal(0, sigma, images.shape))


def shot(images: U8, rng: np.random.Generator, photons: float) -> U8:
    """Poisson counts; `photons` is the count of a full-scale value."""
    return to_u8(rng.poisson(unit(images) * photons) / photons)


def impulse(images: U8, rng: np.random.Generator, amount: float) -> U8:
    """Salt and pepper, half each, on an `amount` of the values; channels independently."""
    draw = rng.uniform(size=images.shape)
    return np.where(draw < amount / 2, 0, np.where(draw < amount, 255, images)).astype(np.uint8)
