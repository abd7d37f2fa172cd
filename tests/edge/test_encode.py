"""Sample encoding: lossless, never larger than raw, and its digest is its identity."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edge.encode import decode_image, encode_image, make_sample
from edge.select import Verdict
from refold.errors import InputError
from refold.v1 import samples_pb2 as pb


@given(arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))))
@settings(max_examples=60, deadline=None)
def test_any_picture_survives(image):
    codec, payload = encode_image(image)
    assert len(payload) <= image.nbytes
    assert np.array_equal(decode_image(codec, payload, image.shape[1], image.shape[0]), image)


def test_a_smooth_picture_shrinks_and_noise_stays_raw():
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3)).copy()
    codec, payload = encode_image(ramp)
    assert codec == pb.IMAGE_CODEC_WEBP_LOSSLESS and len(payload) < ramp.nbytes / 10
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert encode_image(noise)[0] == pb.IMAGE_CODEC_RAW_RGB8


def test_a_picture_beyond_the_formats_side_is_sent_raw():
    assert encode_image(np.zeros((1, 16384, 3), np.uint8))[0] == pb.IMAGE_CODEC_RAW_RGB8


def test_a_view_is_encoded_as_it_looks():
    image = np.random.default_rng(0).integers(0, 40, (16, 12, 3), dtype=np.uint8)
    codec, payload = encode_image(image[::-1, :, ::-1])
    assert np.array_equal(decode_image(codec, payload, 12, 16), image[::-1, :, ::-1])


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_what_is_no_rgb_picture_is_refused(image):
    with pytest.raises(InputError, match="RGB"):
        encode_image(image)


@pytest.mark.parametrize(
    ("codec", "payload", "size"),
    [
        (pb.IMAGE_CODEC_RAW_RGB8, b"12345", (2, 1)),
        (pb.IMAGE_CODEC_WEBP_LOSSLESS, b"RIFFxxxxWEBP", (2, 1)),
        (pb.IMAGE_CODEC_WEBP_LOSSLESS, b"\x89PNG\r\n", (2, 1)),
        (pb.IMAGE_CODEC_WEBP_LOSSLESS, encode_image(np.zeros((9, 9, 3), np.uint8))[1], (9, 8)),
        (pb.IMAGE_CODEC_UNSPECIFIED, b"", (2, 1)),
        (pb.IMAGE_CODEC_RAW_RGB8, b"", (0, 1)),
        (pb.IMAGE_CODEC_RAW_RGB8, b"", (10**5, 10**5)),
    ],
)
def test_a_payload_that_is_not_its_header_is_refused(codec, payload, size):
    with pytest.raises(InputError):
        decode_image(codec, payload, *size)


def test_a_sample_says_who_served_it():
    image = np.zeros((8, 6, 3), np.uint8)
    header, payload = make_sample(
        image, Verdict(True, 0.7, 1.1, "random", True), predicted=3, frame=12, bundle_digest="b", preprocess_digest="p",
        release_version=4, domain="d1", taken_unix_ms=5,
    )  # fmt: skip
    assert header.digest == hashlib.sha256(payload).hexdigest() and header.size == len(payload)
    assert (header.width, header.height, header.predicted, header.frame, header.release_version) == (6, 8, 3, 12, 4)
    assert header.unbiased and header.domain == "d1" and header.score == pytest.approx(0.7)
