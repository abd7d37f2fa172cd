"""Digital and geometric: low contrast, elastic deformation, coarse pixels, JPEG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from scipy import ndimage

from bench.corrupt.pixels import F64, U8, bilinear, to_u8, unit

__all__ = ["contrast", "elastic", "jpeg", "pixelate"]


def contrast(images: U8, rng: np.random.Generator, factor: float) -> U8:
    """Pulls each channel toward its mean over the picture."""
    x = unit(images)
    mean = x.mean((1, 2), keepdims=True)
    return to_u8((x - mean) * factor + mean)


def elastic(images: U8, rng: np.random.Generator, strength: float, smoothness: float, corner: float) -> U8:
    """A random affine map (three points moved by up to `corner` of the side), then a smooth random displacement.

    `strength` and `smoothness` are shares of the side: amplitude, and sigma of the Gaussian that smooths uniform noise.
    """
    n, side = images.shape[:2]
    x = bilinear(unit(images), *_affine_places(n, side, corner * side, rng))
    rows, columns = (np.broadcast_to(a, (n, side, side)) for a in np.mgrid[:side, :side].astype(np.float64))
    moves = []
    for _ in range(2):
        noise = rng.uniform(-1, 1, (n, side, side))
        sigma = smoothness * side
        if sigma > 0:
            noise = ndimage.gaussian_filter(noise, (0, sigma, sigma), mode="reflect", truncate=3)
        moves.append(noise * strength * side)
    # The displacement mirrors about the pixels' outer edges: clamping a place to the outermost pixel centre does the same.
    across, down = (np.clip(_fold(p + m, side), 0, side - 1) for p, m in zip((columns, rows), moves, strict=True))
    return to_u8(bilinear(x, down, across))


def _fold(place: F64, side: int) -> F64:
    """Mirrors places about the lines -0.5 and side - 0.5."""
    place = np.where(place < -0.5, -1 - place, place)
    return np.where(place > side - 0.5, 2 * side - 1 - place, place)


def _affine_places(n: int, side: int, reach: float, rng: np.random.Generator) -> tuple[F64, F64]:
    """Where each output pixel comes from under the affine map that sends three fixed points to moved ones."""
    centre, third = side // 2, side // 3
    fixed = np.array(
        [[centre + third, centre + third], [centre + third, centre - third], [centre - third, centre - third]], float
    )
    moved = fixed + rng.uniform(-reach, reach, (n, 3, 2))
    ones = np.ones((n, 3, 1))
    # Rows are (x, y, 1): solved backwards, from moved to fixed.
    back = np.linalg.solve(np.concatenate([moved, ones], 2), np.broadcast_to(fixed, (n, 3, 2)))
    y, x = np.mgrid[:side, :side].astype(np.float64)
    grid = np.stack([x.ravel(), y.ravel(), np.ones(side * side)], 1)
    places = (grid @ back).reshape(n, side, side, 2)
    return places[..., 1], places[..., 0]


def pixelate(images: U8, rng: np.random.Generator, share: float) -> U8:
    side = images.shape[1]
    small = int(side * share)

    def coarse(picture: U8) -> Image.Image:
        shrunk = Image.fromarray(picture).resize((small, small), Image.Resampling.BOX)
        return shrunk.resize((side, side), Image.Resampling.BOX)

    return np.stack([np.asarray(coarse(p)) for p in images])


def jpeg(images: U8, rng: np.random.Generator, quality: int) -> U8:
    def coded(picture: U8) -> U8:
        content = io.BytesIO()
        Image.fromarray(picture).save(content, "JPEG", quality=quality)
        return np.asarray(Image.open(content).convert("RGB"))

    return np.stack([coded(p) for p in images])
