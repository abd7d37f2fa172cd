"""Scales: zero is exact, the range is covered, an absorbed activation function is never overstepped."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.quantise import quantise_weights
from export.scales import OBSERVERS, Range, scale_of, squared_error

NUMBERS = st.floats(-1e4, 1e4, width=32)


@given(NUMBERS, NUMBERS)
def test_the_codes_cover_the_range(a, b):
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    s = scale_of(low, high)
    assert 0 <= s.zero_point <= 255 and s.scale > 0
    assert (0 - s.zero_point) * s.scale <= low + s.scale and (255 - s.zero_point) * s.scale >= high - s.scale


@given(NUMBERS, NUMBERS, st.sampled_from([(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-2.0, 2.0), (-math.inf, 3.0)]))
def test_codes_stay_inside_an_absorbed_clamp(a, b, clamp):
    s = scale_of(min(a, b), max(a, b), clamp)
    scale = np.float32(s.scale)
    assert np.float32((255 - s.zero_point) * scale) <= np.float32(clamp[1])
    assert np.float32(-s.zero_point * scale) >= np.float32(clamp[0])


def ranged(values):
    seen = Range()
    seen.widen(values.astype(np.float32))
    seen.count(values.astype(np.float32))
    return seen


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_stay_within_what_was_seen(name):
    rng = np.random.default_rng(0)
    for values in (rng.normal(0, 1, 20_000), np.maximum(rng.normal(0, 1, 20_000), 0), np.zeros(10), -rng.exponential(1, 5000)):
        seen = ranged(values)
        low, high = OBSERVERS[name](seen)
        assert seen.low <= low <= 0 <= high <= seen.high


def test_outliers_are_left_out_by_percentile_and_entropy_only():
    values = np.concatenate([np.random.default_rng(0).normal(0, 1, 100_000), [80.0]])
    seen = ranged(values)
    assert OBSERVERS["minmax"](seen)[1] == 80.0
    for name in ("percentile", "entropy"):
        assert OBSERVERS[name](seen)[1] < 40.0
        assert squared_error(seen, scale_of(*OBSERVERS[name](seen))) > 0


@given(st.integers(0, 2**32 - 1), st.sampled_from([64, 127]))
def test_weight_codes_are_the_nearest_and_zero_channels_have_no_scale(seed, qmax):
    w = np.random.default_rng(seed).normal(0, 1, (4, 3, 2, 2)).astype(np.float32)
    w[2] = 0
    got = quantise_weights(w, 8, qmax)
    assert got.codes.dtype == np.int8 and np.abs(got.codes).max() == qmax and got.scale[2] == 0
    assert (np.abs(got.dequantised() - w) <= got.scale.reshape(-1, 1, 1, 1) * 0.5001).all()
    assert np.array_equal(got.signed(np.array([1, -1, 1, 1], np.int8))[1], -got.codes[1])


@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.sampled_from([64, 127]))
def test_few_bits_stay_in_a_narrow_range_and_clip_where_that_pays(seed, bits, qmax):
    w = np.random.default_rng(seed).standard_t(3, (3, 40)).astype(np.float32)
    got = quantise_weights(w, bits, qmax)
    limit = 2 ** (bits - 1) - 1
    plain = np.abs(w).max(1, keepdims=True) / limit
    assert got.bits == bits and np.abs(got.codes).max() <= limit
    unclipped = np.clip(np.rint(w / plain), -limit, limit) * plain
    assert (((got.dequantised() - w) ** 2).sum(1) <= ((unclipped - w) ** 2).sum(1) * 1.0001).all()


@given(NUMBERS, NUMBERS, st.integers(2, 7), st.sampled_from([None, (0.0, math.inf), (0.0, 6.0)]))
def test_scales_of_fewer_levels(a, b, bits, clamp):
    s = scale_of(min(a, b), max(a, b), clamp, 2**bits)
    assert s.levels == 2**bits and 0 <= s.zero_point < s.levels and s.scale > 0
    if clamp:
        assert np.float32((s.levels - 1 - s.zero_point) * np.float32(s.scale)) <= np.float32(clamp[1])


def test_least_squares_clip_more_the_fewer_the_levels():
    seen = ranged(np.random.default_rng(0).normal(0, 1, 100_000))
    reach = [OBSERVERS["mse"](seen, 2**bits)[1] for bits in (2, 4, 8)]
    assert reach == sorted(reach) and reach[0] < reach[2]
    for levels in (4, 16):
        best = squared_error(seen, scale_of(*OBSERVERS["mse"](seen, levels), levels=levels))
        assert best <= min(squared_error(seen, scale_of(*o(seen, levels), levels=levels)) for o in OBSERVERS.values())
