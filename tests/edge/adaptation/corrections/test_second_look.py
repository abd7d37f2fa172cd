"""The second look: only unsure frames, never more than its share, and the mean of two answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.adaptation.corrections import SecondLook, as_logits


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, math.log(10)), min_size=1, max_size=800))
def test_the_looks_stay_within_their_share_at_any_time(entropies):
    look = SecondLook(10)
    for entropy in entropies:
        look.wants(entropy)
        assert look.looks <= 0.2 * look.frames + 1e-9
        assert look.metrics()["compute_ratio"] <= 1.2 + 1e-9


def test_the_most_unsure_frames_are_looked_at():
    rng = np.random.default_rng(0)
    look = SecondLook(10)
    entropies = rng.uniform(0, 2, 4000)
    looked = np.array([look.wants(e) for e in entropies])
    assert 0.15 < looked.mean() <= 0.2 and entropies[500:][looked[500:]].min() > 1.4


def test_sure_frames_are_not_looked_at_however_alike_they_are():
    look = SecondLook(10)
    assert not any(look.wants(0.01) for _ in range(1000)) and look.metrics()["compute_ratio"] == 1.0
    assert not look.wants(math.nan) and look.looks == 0


def test_the_mean_of_two_answers():
    first, second = np.array([0.7, 0.3], np.float32), np.array([0.1, 0.9], np.float32)
    np.testing.assert_allclose(SecondLook.average(first, second), [0.4, 0.6], rtol=1e-6)
    assert SecondLook.average(first, np.full(2, np.nan, np.float32)) is first


def test_logits_of_probabilities():
    p = np.array([0.7, 0.3, 0.0], np.float32)
    powers = np.exp(as_logits(p))
    np.testing.assert_allclose(powers / powers.sum(), p, atol=1e-6)
    assert as_logits(p) == pytest.approx([math.log(0.7), math.log(0.3), math.log(1e-30)], rel=1e-5)
