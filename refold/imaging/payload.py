"""An uploaded sample's payload as pixels: lossless WebP or raw RGB of exactly the announced size."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from refold.errors import InputError
from refold.imaging.read import decoded
from refold.limits import LIMITS
from refold.v1 import samples_pb2 as pb

__all__ = ["decode_payload"]


def decode_payload(codec: int, payload: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """uint8 (height, width, 3), RGB.

    Raises:
        InputError: an unknown codec, damaged bytes, more than one frame, or another size than announced.
    """
    if width < 1 or height < 1 or width * height > LIMITS.image_pixels:
        raise InputError(f"An image of {width}x{height} pixels is not accepted.", code="wrong-size")
    if codec == pb.IMAGE_CODEC_RAW_RGB8:
        if len(payload) != width * height * 3:
            raise InputError(
                f"A raw image of {width}x{height} has {width * height * 3} bytes, not {len(payload)}.", code="wrong-size"
            )
        return np.frombuffer(payload, np.uint8).reshape(height, width, 3)
    if codec != pb.IMAGE_CODEC_WEBP_LOSSLESS:
        raise InputError(f"The image codec {codec} is not known here: update Refold.", code="codec")
    try:
        picture = decoded(io.BytesIO(payload), ("WEBP",), size=(width, height), one_frame=True)
    except InputError as e:
        code = "wrong-size" if e.code == "wrong-size" else "unreadable"
        raise InputError(f"The image {e.message}", code=code, detail=e.detail) from e
    if picture.size != (width, height):
        raise InputError("The image is turned by its EXIF orientation, which uploads have none of.", code="wrong-size")
    return np.asarray(picture, np.uint8)
