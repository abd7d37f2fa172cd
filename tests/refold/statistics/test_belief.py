"""A mix near the calibration images' is taken for theirs, and any other for what it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statistics_of import CLASSES, class_moments, table

from refold.statistics import Layout
from refold.statistics.belief import believed, chance_of_home

CLASSES_ = class_moments(Layout(table()))
NARROW = np.array([0.85, 0.05, 0.05, 0.05])


def test_their_own_mix_is_theirs_and_one_class_is_not():
    assert chance_of_home(CLASSES_, CLASSES_.home) > 0.9
    assert chance_of_home(CLASSES_, NARROW) < 1e-6
    np.testing.assert_allclose(believed(CLASSES_, NARROW), NARROW, atol=1e-6)


def test_what_answers_scatter_is_taken_back():
    rng = np.random.default_rng(0)
    seen = rng.dirichlet(120 * CLASSES_.home, 50)
    taken = np.stack([believed(CLASSES_, mix) for mix in seen])
    assert np.abs(taken - CLASSES_.home).mean() < 0.5 * np.abs(seen - CLASSES_.home).mean()


@given(st.lists(st.floats(0.001, 1), min_size=CLASSES, max_size=CLASSES))
def test_it_lies_between_both(values):
    mix = np.array(values) / sum(values)
    found = believed(CLASSES_, mix)
    assert found.sum() == pytest.approx(1)
    low, high = np.minimum(mix, CLASSES_.home), np.maximum(mix, CLASSES_.home)
    assert (found >= low - 1e-9).all() and (found <= high + 1e-9).all()
