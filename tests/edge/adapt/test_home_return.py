"""Return home: within a few frames, hardly ever by chance, and not for a third domain."""

from __future__ import annotations

import numpy as np
import pytest

from edge.adapt import FEATURES, Reference
from edge.adapt.home import HomeReturn

FLOOR = 0.025


def features(seed: int, count: int, at: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(at, 1, (count, FEATURES))


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.of(features(0, 2000))


def watching(reference: Reference) -> HomeReturn:
    found = HomeReturn(reference, FLOOR)
    found.restart(reference.mean)
    return found


def first(found: HomeReturn, frames: np.ndarray, present: float, known: float = 200.0, independent: float = 1.0) -> int | None:
    """Number of the frame, from 1, at which it is home again."""
    mean = np.full(FEATURES, present)
    return next((i for i, v in enumerate(frames, 1) if found.watch(v, mean, known, independent)), None)


@pytest.mark.parametrize(("away", "most"), [(0.5, 40), (1.0, 15), (3.0, 6)])
def test_home_is_recognised_the_sooner_the_farther_one_was(reference, away, most):
    took = [first(watching(reference), features(seed, 200), away) for seed in range(1, 9)]
    assert all(t is not None and t <= most for t in took), took


@pytest.mark.parametrize("away", [0.4, 1.0, 3.0])
def test_a_domain_that_goes_on_is_not_left(reference, away):
    assert all(first(watching(reference), features(seed, 4000, away), away) is None for seed in range(1, 4))


def test_a_mean_of_few_frames_is_no_reason(reference):
    """The present mean is off by what 24 frames leave open."""
    rng = np.random.default_rng(5)
    for seed in range(1, 9):
        mean = 0.6 + rng.normal(0, 24**-0.5, FEATURES)
        found = watching(reference)
        assert not any(found.watch(v, mean, 24, 1.0) for v in features(seed, 1000, 0.6))


def test_a_third_domain_nearer_to_home_is_not_home(reference):
    for third in (0.8, -0.8):
        assert first(watching(reference), features(2, 300, third), 3.0) is None


def test_frames_that_resemble_each_other_count_for_fewer(reference):
    alone, together = (first(watching(reference), features(3, 400), 1.0, independent=i) for i in (1.0, 0.1))
    assert alone is not None and together is not None and together > 4 * alone


def test_frames_are_watched_one_by_one_while_it_is_likely(reference):
    found = watching(reference)
    assert not found.suspicious
    found.watch(reference.mean, np.full(FEATURES, 2.0), 200, 1.0)
    assert found.suspicious
    found.restart(reference.mean)
    assert not found.suspicious
