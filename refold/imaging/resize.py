"""An RGB image at the model's size. A centre crop first scales the short side, then takes the middle."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from refold.errors import InputError
from refold.limits import LIMITS
from refold.preprocess import Preprocess, Resize

__all__ = ["fit", "resized"]

U8 = NDArray[np.uint8]


def fit(image: U8, preprocess: Preprocess, name: str = "The image") -> U8:
    """Pixels in memory, uint8 (h, w, 3), at the model's size.

    Args:
        name: begins the sentence of an error.

    Raises:
        InputError: not 8-bit RGB, or of another size where resizing is not allowed.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"{name} is {'x'.join(map(str, image.shape))} of {image.dtype}, not 8-bit RGB.", code="not-rgb")
    if image.shape[:2] == (preprocess.height, preprocess.width) and preprocess.resize is not Resize.CENTRE_CROP:
        return image
    return resized(Image.fromarray(image), preprocess, name)


def resized(picture: Image.Image, preprocess: Preprocess, name: str = "The image") -> U8:
    """`fit` for a Pillow image of mode RGB; bilinear, with support scaled to the reduction (Pillow's BILINEAR)."""
    width, height = preprocess.width, preprocess.height
    if preprocess.resize is Resize.EXACT:
        if picture.size != (width, height):
            size = f"{picture.width}x{picture.height}, not {width}x{height}"
            raise InputError(f"{name} is {size}: the model takes exactly {width}x{height}.", code="wrong-size")
        return np.asarray(picture, np.uint8)
    if preprocess.resize is Resize.STRETCH:
        return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR), np.uint8)
    factor = max(preprocess.resize_short, width, height) / min(picture.size)
    size_near = (max(round(picture.width * factor), width), max(round(picture.height * factor), height))
    if size_near[0] * size_near[1] > LIMITS.image_pixels:
        raise InputError(f"{name}, {picture.width}x{picture.height}, is too elongated to be resized.", code="wrong-size")
    left, top = (size_near[0] - width) // 2, (size_near[1] - height) // 2
    near = picture.resize(size_near, Image.Resampling.BILINEAR)
    return np.asarray(near.crop((left, top, left + width, top + height)), np.uint8)
