"""Packed integers: every stream comes back, takes the bytes it promises, and damage is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refold.errors import BundleError
from refold.packing import AT_ONCE, PackedCodes, pack, packed_size, unpack, weights_from_bytes, weights_to_bytes


@st.composite
def codes_and_bits(draw):
    """Symmetric codes, or asymmetric ones whose zero point was subtracted; some channels with their sign flipped."""
    bits = draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 5)), *draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    unsigned = rng.integers(0, 2**bits, shape)
    zero = rng.integers(0, 2**bits, shape[0]) if draw(st.booleans()) else np.full(shape[0], 2 ** (bits - 1))
    sign = rng.choice([-1, 1], shape[0]) if draw(st.booleans()) else np.ones(shape[0], int)
    wide = (shape[0], *[1] * (len(shape) - 1))
    return ((unsigned - zero.reshape(wide)) * sign.reshape(wide)).astype(np.int8), bits


@given(codes_and_bits())
def test_codes_come_back_from_as_many_bytes_as_promised(drawn):
    codes, bits = drawn
    packed = pack(codes, bits)
    assert len(packed.data) == packed_size(codes.size, bits) == -(-codes.size * bits // 8)
    again = weights_from_bytes(weights_to_bytes({"a": packed}))["a"]
    assert again == packed and np.array_equal(unpack(again), codes) and unpack(again).dtype == np.int8


def test_a_stream_longer_than_one_piece():
    codes = np.random.default_rng(0).integers(-4, 4, (3, AT_ONCE // 2 + 5)).astype(np.int8)
    assert np.array_equal(unpack(pack(codes, 3)), codes)


def test_wide_codes_are_kept_as_they_are():
    assert packed_size(1000, 7) == packed_size(1000, 8) == 1000
    with pytest.raises(ValueError, match="2 to 6 bits"):
        pack(np.zeros((1, 1), np.int8), 8)
    with pytest.raises(ValueError, match="span 9 values"):
        pack(np.array([[-4, 4]], np.int8), 3)


@pytest.mark.parametrize(
    "damage",
    [
        {"data": b"123"},
        {"shape": (2, 5)},
        {"shape": ()},
        {"shape": (2**31, 2**31)},
        {"bits": 0},
        {"bits": 9},
        {"offset": (1, 2, 3)},
        {"offset": (4000,)},
    ],
)
def test_damage_is_refused(damage):
    good = PackedCodes((2, 4), 4, (8,), bytes(4))
    assert unpack(good).tolist() == [[-8] * 4] * 2
    with pytest.raises(BundleError):
        unpack(replace(good, **damage))


def test_noise_is_no_set_of_weights():
    for content in (b"\xff\xff", weights_to_bytes({"a": PackedCodes((1,), 2, (2,), b"\0")}) * 2):
        with pytest.raises(BundleError):
            weights_from_bytes(content)
