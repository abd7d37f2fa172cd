"""Weather: snow, frost, fog and glaring light."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from skimage.color import hsv2rgb, rgb2hsv

from bench.corrupt.pixels import F64, U8, to_u8, unit, wand_motion_blur, zoom_matrix
from demo.weather import fog as plasma_fog

__all__ = ["brightness", "fog", "frost", "frost_texture", "snow"]

GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 luma


def snow(
    images: U8,
    rng: np.random.Generator,
    mean: float,
    spread: float,
    zoom: float,
    threshold: float,
    radius: int,
    sigma: float,
    keep: float,
) -> U8:
    """Flakes from thresholded noise, enlarged and blown downwards, over a whitened picture, once upright and once turned."""
    n, side = images.shape[:2]
    x = unit(images)
    m = zoom_matrix(side, zoom)
    flakes = np.einsum("ri,nij,sj->nrs", m, rng.normal(mean, spread, (n, side, side)), m, optimize=True)
    flakes[flakes < threshold] = 0
    blown = wand_motion_blur(unit(to_u8(flakes))[..., None], radius, sigma, np.asarray(rng.uniform(-135, -45, n)))
    whitened = np.maximum(x, (x @ GREY)[..., None] * 1.5 + 0.5)
    return to_u8(keep * x + (1 - keep) * whitened + blown + blown[:, ::-1, ::-1])


@dataclass(frozen=True)
class FrostKind:
    """One sort of ice, as numbers: colour and its spread between places, and a texture's power over spatial frequency.

    The power at k cycles per 32 pixels is `power * k**-decay + speckle`; `skew` is the texture's third moment (dark cracks
    below 0, bright crystals above); `tint` is the direction in RGB along which the texture varies.
    """

    share: float
    colour: tuple[float, float, float]
    spread: float
    power: float
    decay: float
    speckle: float
    skew: float
    tint: tuple[float, float, float]


# Measured, in five groups, on what frost@5 adds to the 500 pictures of the data folder's reference block (divided by its 0.45).
FROST = (
    FrostKind(0.21, (72, 145, 163), 10, 12000, 2.0, 150, 0.47, (0.79, 0.48, 0.37)),  # teal glaze
    FrostKind(0.15, (95, 106, 119), 9, 23500, 1.1, 400, 0.45, (0.58, 0.58, 0.57)),  # crystals on slate
    FrostKind(0.36, (199, 203, 212), 9, 10500, 1.7, 400, -1.07, (0.56, 0.58, 0.59)),  # rime with dark pits
    FrostKind(0.24, (141, 158, 170), 11, 13500, 1.5, 1000, -0.17, (0.58, 0.57, 0.58)),  # grain on blue glass
    FrostKind(0.04, (119, 130, 140), 10, 47500, 1.2, 1500, 0.16, (0.59, 0.58, 0.56)),  # ferns
)


def frost_texture(count: int, side: int, rng: np.random.Generator) -> F64:
    """Procedural ice, (count, side, side, 3), values 0..255: each picture one kind of `FROST`."""
    kinds = rng.choice(len(FROST), count, p=[k.share for k in FROST])
    cycles = 32 * np.hypot(np.fft.fftfreq(2 * side)[:, None], np.fft.rfftfreq(2 * side)[None, :])
    out = np.empty((count, side, side, 3))
    for i, kind in enumerate(FROST):
        chosen = np.flatnonzero(kinds == i)
        # Drawn at twice the side and cropped, so that opposite borders are not each other's neighbours.
        white = np.fft.rfft2(rng.normal(size=(len(chosen), 2 * side, 2 * side)))
        density = kind.power * np.maximum(cycles, 0.5) ** -kind.decay + kind.speckle
        texture = np.fft.irfft2(white * np.sqrt(density), s=(2 * side, 2 * side))[:, :side, :side]
        deviation = np.sqrt(density[:, 1:].mean())
        z = texture / deviation
        skewed = (z + kind.skew / 6 * (z**2 - 1)) / np.sqrt(1 + 2 * (kind.skew / 6) ** 2)
        base = np.array(kind.colour) + kind.spread * rng.normal(size=(len(chosen), 1, 1, 1))
        out[chosen] = base + deviation * skewed[..., None] * np.array(kind.tint)
    return np.clip(out, 0, 255)


def frost(images: U8, rng: np.random.Generator, keep: float, ice: float) -> U8:
    """The picture dimmed to `keep` with an `ice` share of a frost texture added."""
    n, side = images.shape[:2]
    return to_u8((keep * images + ice * np.floor(frost_texture(n, side, rng))) / 255)


def fog(images: U8, rng: np.random.Generator, thickness: float, decay: float) -> U8:
    """A plasma cloud over each picture, darkened so that its brightest value stays what it was."""
    return plasma_fog(images, rng, thickness, decay)


def brightness(images: U8, rng: np.random.Generator, more: float) -> U8:
    """Adds to the value of HSV."""
    hsv: NDArray[np.float64] = rgb2hsv(unit(images))
    hsv[..., 2] = np.clip(hsv[..., 2] + more, 0, 1)
    return to_u8(hsv2rgb(hsv))
