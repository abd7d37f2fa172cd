"""Decoding: the one place where an image file's bytes, which may be hostile, meet a decoder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from refold.errors import InputError
from refold.imaging.convert import to_rgb, upright
from refold.imaging.files import open_regular
from refold.imaging.resize import resized
from refold.limits import LIMITS
from refold.preprocess import Preprocess

__all__ = ["FORMATS", "decoded", "read_image"]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")  # decoders that hostile files reach; the rest are not worth it


def read_image(path: Path, preprocess: Preprocess, name: str = "The image") -> NDArray[np.uint8]:
    """An image file as the model takes it: uint8 (height, width, 3).

    Args:
        name: begins the sentence of an error.

    Raises:
        InputError: code is not-a-file, unreadable, not-rgb, too-large or wrong-size.
    """
    try:
        with open_regular(path) as file:
            return resized(decoded(file), preprocess, name)
    except InputError as e:
        message = e.message if e.message.startswith(name) else f"{name} {e.message}"
        raise InputError(message, code=e.code, detail=e.detail) from e


def decoded(
    file: BinaryIO, formats: tuple[str, ...] = FORMATS, *, size: tuple[int, int] | None = None, one_frame: bool = False
) -> Image.Image:
    """The first frame, upright and 8-bit RGB, in memory.

    Args:
        formats: Pillow's names of those that are tried.
        size: (width, height) that the header must tell, before anything is unpacked; None takes any.
        one_frame: refuse animations.

    Raises:
        InputError: its message continues a sentence that begins with the image's name.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a doubtful EXIF block, a bomb below our own limit
            with Image.open(file, formats=formats) as picture:
                if picture.width * picture.height > LIMITS.image_pixels:
                    raise InputError(
                        f"is {picture.width}x{picture.height}, more than the limit of {LIMITS.image_pixels} pixels.",
                        code="too-large",
                    )
                if size is not None and picture.size != size:
                    raise InputError(f"is {picture.size}, its header says {size}.", code="wrong-size")
                if one_frame and getattr(picture, "n_frames", 1) != 1:
                    raise InputError("is an animation.", code="unreadable")
                picture.load()
                return to_rgb(upright(picture))
    except InputError:
        raise
    except Image.DecompressionBombError as e:
        raise InputError("would unpack to far more pixels than the limit.", code="too-large") from e
    except UnidentifiedImageError as e:
        raise InputError("cannot be read: it is no image, or of a kind that is not read here.", code="unreadable") from e
    except Exception as e:  # a decoder fed with damaged bytes raises nearly anything
        raise InputError(f"cannot be read: {e or type(e).__name__}.", code="unreadable", detail=repr(e)) from e
