"""From a frame to a sample: lossless WebP or raw pixels, whichever is smaller, and the header that goes before it."""

from __future__ import annotations

import hashlib
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from edge.select import Verdict
from refold.errors import InputError
from refold.imaging import decode_payload as decode_image
from refold.v1 import samples_pb2 as pb

__all__ = ["decode_image", "encode_image", "make_sample"]

WEBP_SIDE = 16383  # the format's own limit
EFFORT, QUALITY = 2, 25  # lossless whatever these are; 0.5 ms for 32x32 and 0.15 s for 640x640, within 2 % of the slowest


def encode_image(image: NDArray[np.uint8]) -> tuple[pb.ImageCodec, bytes]:
    """Encodes losslessly.

    Args:
        image: uint8 (height, width, 3), RGB.

    Returns:
        (codec, payload); the payload is never larger than the raw pixels.

    Raises:
        InputError: not an 8-bit RGB picture.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise InputError(f"Samples are 8-bit RGB pictures; this one is {image.shape} of {image.dtype}.", code="wrong-size")
    raw = np.ascontiguousarray(image).tobytes()
    if max(image.shape) <= WEBP_SIDE and features.check("webp"):
        out = io.BytesIO()
        Image.fromarray(image).save(out, "WEBP", lossless=True, quality=QUALITY, method=EFFORT)
        if out.tell() < len(raw):
            return pb.IMAGE_CODEC_WEBP_LOSSLESS, out.getvalue()
    return pb.IMAGE_CODEC_RAW_RGB8, raw


def make_sample(
    image: NDArray[np.uint8],
    verdict: Verdict,
    *,
    predicted: int,
    frame: int,
    bundle_digest: str,
    preprocess_digest: str,
    release_version: int,
    domain: str,
    taken_unix_ms: int,
) -> tuple[pb.SampleHeader, bytes]:
    """A header and payload for `Outbox.put`.

    Args:
        image: uint8 (height, width, 3), the picture as it was served.
        verdict: the selector's; its score, entropy and `unbiased` go into the header.
        predicted: class index of the served prediction.
        frame: running number of the frame.
        release_version: of the engine that served it, 0 as exported.
    """
    codec, payload = encode_image(image)
    header = pb.SampleHeader(
        digest=hashlib.sha256(payload).hexdigest(),
        bundle_digest=bundle_digest,
        release_version=release_version,
        preprocess_digest=preprocess_digest,
        score=verdict.score,
        entropy=verdict.entropy,
        predicted=predicted,
        taken_unix_ms=taken_unix_ms,
        frame=frame,
        domain=domain,
        width=image.shape[1],
        height=image.shape[0],
        codec=codec,
        size=len(payload),
        unbiased=verdict.unbiased,
    )
    return header, payload
