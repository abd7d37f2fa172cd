"""Any kind of image as upright 8-bit RGB, by rules that do not depend on the image's content.

    orientation                 EXIF's eight are applied; a damaged EXIF block counts as none
    grey (1, L, I;16, I)        the same value in all three channels
    more than 8 bits            scaled to 0..255 and rounded, never cut off: value * 255 / largest
    alpha (LA, RGBA, PA, tRNS)  composited on BACKGROUND in the stored values: c * a + background * (1 - a), rounded
    palette (P)                 looked up
    CMYK                        r = (255 - c) * (255 - k) / 255: Pillow's, without a colour profile
    YCbCr                       JFIF's full-range BT.601
    colour profiles             ignored: numbers are taken for sRGB, as cameras and training pipelines do
    animations                  the first frame

Refused: 32-bit integer and float images, whose largest value the file does not tell, and colour spaces that need a profile
(LAB).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from refold.errors import InputError

__all__ = ["BACKGROUND", "to_rgb", "upright"]

BACKGROUND = 255  # white, on which a browser or a page shows a transparent image
ORIENTATION = 0x0112  # EXIF 2.32, table 4
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF 6.0, section 8


def upright(picture: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says it is to be looked at."""
    try:
        turn = TURNS.get(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF parsers raise nearly anything; the pixels are good all the same
        return picture
    return picture if turn is None else picture.transpose(turn)


def to_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB of the same size; an image that is that already is returned as it is.

    Raises:
        InputError: code "not-rgb": a kind of image whose values mean nothing without more knowledge.
    """
    mode, transparent = picture.mode, picture.info.get("transparency") is not None
    if mode in SIXTEEN or mode == "I":
        return _deep_grey(picture)
    if mode in ("RGB", "L", "1") and not transparent:
        return picture if mode == "RGB" else picture.convert("RGB")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or (transparent and mode in ("1", "L", "P", "RGB")):
        return _composited(picture)
    if mode in ("P", "RGBX", "CMYK", "YCbCr"):
        return picture.convert("RGB")
    raise InputError(f"is of mode {mode}, which cannot be converted to 8-bit RGB.", code="not-rgb")


def _deep_grey(picture: Image.Image) -> Image.Image:
    largest, inverted = _depth(picture)
    values = np.asarray(picture).astype(np.int64)
    grey = _scaled(largest - values if inverted else values, largest)
    key = picture.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = BACKGROUND
    return Image.fromarray(np.repeat(grey[:, :, None], 3, 2))


def _depth(picture: Image.Image) -> tuple[int, bool]:
    """(largest value, whether it is black) of a grey image with more than 8 bits."""
    tags: Any = getattr(picture, "tag_v2", None)
    if tags is None:
        if picture.mode == "I" and picture.format not in ("PNG", "PPM"):  # of these, Pillow's I holds 16 bits
            raise InputError("has 32-bit values, whose largest one it does not tell.", code="not-rgb")
        return 65_535, False
    bits = tags.get(BITS, (16,))
    if picture.mode == "I":
        raise InputError("has 32-bit or signed values, whose largest one it does not tell.", code="not-rgb")
    return (1 << int(bits[0])) - 1, tags.get(PHOTOMETRIC) == WHITE_IS_ZERO


def _scaled(values: NDArray[np.int64], largest: int) -> NDArray[np.uint8]:
    return np.clip((values * 255 + largest // 2) // largest, 0, 255).astype(np.uint8)


def _composited(picture: Image.Image) -> Image.Image:
    rgba = np.asarray(picture.convert("RGBA"))
    colour, alpha = rgba[:, :, :3].astype(np.uint32), rgba[:, :, 3:].astype(np.uint32)
    return Image.fromarray(((colour * alpha + BACKGROUND * (255 - alpha) + 127) // 255).astype(np.uint8))
