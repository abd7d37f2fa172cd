"""From an uploaded payload to pixels; the only decoder the service has, fed with hostile bytes."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from refold.errors import InputError
from refold.limits import LIMITS
from refold.v1 import samples_pb2 as pb

__all__ = ["decode_picture"]


def decode_picture(codec: int, payload: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """Decodes one lossless picture: uint8 (height, width, 3), RGB.

    Raises:
        InputError: an unknown codec, damaged bytes, more than one frame, or another size than announced.
    """
    if width < 1 or height < 1 or width * height > LIMITS.image_pixels:
        raise InputError(f"A picture of {width}x{height} pixels is not accepted.", code="wrong-size")
    if codec == pb.IMAGE_CODEC_RAW_RGB8:
        if len(payload) != width * height * 3:
            raise InputError(
                f"A raw picture of {width}x{height} has {width * height * 3} bytes, not {len(payload)}.", code="wrong-size"
            )
        return np.frombuffer(payload, np.uint8).reshape(height, width, 3)
    if codec != pb.IMAGE_CODEC_WEBP_LOSSLESS:
        raise InputError(f"Image codec {codec} is not known here: update the service.", code="codec")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(payload), formats=["WEBP"]) as picture:
                if picture.size != (width, height):
                    raise InputError(f"The picture is {picture.size}, its header says {(width, height)}.", code="wrong-size")
                if getattr(picture, "n_frames", 1) != 1:
                    raise InputError("The picture is an animation.", code="unreadable")
                return np.asarray(picture.convert("RGB"), np.uint8)
    except InputError:
        raise
    except Exception as e:  # a decoder fed with hostile bytes raises nearly anything
        raise InputError("The picture cannot be decoded.", code="unreadable", detail=repr(e)) from e
