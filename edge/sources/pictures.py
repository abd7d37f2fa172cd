"""From a file to the model's size, and the account of what could not be used.

Only 8-bit RGB is taken: grey, palette, alpha, CMYK and 16-bit pictures are refused, because every way of converting them is a
guess about what the model was trained on. EXIF orientation is not applied: a fixed camera's model was trained on what it sees.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from refold.errors import InputError
from refold.limits import LIMITS
from refold.preprocess import Preprocess, Resize

__all__ = ["SUFFIXES", "Skipped", "fit", "load_picture"]

log = logging.getLogger(__name__)
U8 = NDArray[np.uint8]
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF")  # decoders that see hostile files; the rest are not worth the risk
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"})
SAID = 20  # skipped pictures named in the log one by one; then every hundredth


class Skipped:
    """Counts and names pictures that could not be used. `last` is the newest one's name and reason."""

    def __init__(self) -> None:
        self.count = 0
        self.last = ""

    def add(self, name: str, error: InputError) -> None:
        self.count += 1
        self.last = f"{name}: {error.message}"
        if self.count <= SAID or self.count % 100 == 0:
            log.warning("Skipped picture %d, %s", self.count, self.last)


def load_picture(path: Path, preprocess: Preprocess) -> U8:
    """uint8 (height, width, 3) of the model's size.

    Raises:
        InputError: code is unreadable, not-rgb, too-large or wrong-size.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            picture = Image.open(path, formats=FORMATS)
        with picture:
            if picture.width * picture.height > LIMITS.image_pixels:
                raise InputError(
                    f"{picture.width}x{picture.height} pixels are more than the limit of {LIMITS.image_pixels}.",
                    code="too-large",
                )
            if picture.mode != "RGB":
                raise InputError(f"The picture is {picture.mode}, not 8-bit RGB.", code="not-rgb")
            if preprocess.resize is Resize.EXACT:
                _check_size(picture.width, picture.height, preprocess)
                return np.asarray(picture)
            return _resize(picture, preprocess)
    except Image.DecompressionBombError as e:
        raise InputError("The picture would unpack to far more pixels than the limit.", code="too-large") from e
    except UnidentifiedImageError as e:
        raise InputError("The file is no picture, or of a kind that is not read here.", code="unreadable") from e
    except (OSError, ValueError, SyntaxError, EOFError) as e:
        raise InputError(f"The picture cannot be read: {e}.", code="unreadable", detail=repr(e)) from e


def fit(image: U8, preprocess: Preprocess) -> U8:
    """A picture in memory, uint8 (h, w, 3), at the model's size.

    Raises:
        InputError: not 8-bit RGB, or of another size where resizing is not allowed.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"The picture is {'x'.join(map(str, image.shape))} of {image.dtype}, not 8-bit RGB.", code="not-rgb")
    if image.shape[:2] == (preprocess.height, preprocess.width) and preprocess.resize is not Resize.CENTRE_CROP:
        return image
    if preprocess.resize is Resize.EXACT:
        _check_size(image.shape[1], image.shape[0], preprocess)
    return _resize(Image.fromarray(image), preprocess)


def _check_size(width: int, height: int, preprocess: Preprocess) -> None:
    if (width, height) != (preprocess.width, preprocess.height):
        raise InputError(
            f"The picture is {width}x{height}, the model takes exactly {preprocess.width}x{preprocess.height}.",
            code="wrong-size",
        )


def _resize(picture: Image.Image, preprocess: Preprocess) -> U8:
    width, height = preprocess.width, preprocess.height
    if preprocess.resize is Resize.STRETCH:
        return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    short = max(preprocess.resize_short, width, height)
    factor = short / min(picture.size)
    size = (max(round(picture.width * factor), width), max(round(picture.height * factor), height))
    if size[0] * size[1] > LIMITS.image_pixels:
        raise InputError(f"A picture of {picture.width}x{picture.height} is too elongated to be resized.", code="wrong-size")
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    scaled = picture.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(scaled.crop((left, top, left + width, top + height)))
