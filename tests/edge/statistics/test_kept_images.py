"""Kept images: each once, no more than there is room for, and worth as many independent ones as they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.adapt import FEATURES, Evidence, KeptImages, Reference
from edge.adapt.kept import independent

RNG = np.random.default_rng(0)
REFERENCE = Reference.of(RNG.normal(0, 1, (400, FEATURES)))


def photographs(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def test_an_image_is_kept_once_and_the_set_is_bounded() -> None:
    kept, images = KeptImages(4), photographs(6)
    assert kept.add(3, images[0]) and not kept.add(4, images[0]) and not kept.add(5, images[0].copy())
    assert [kept.add(6 + i, image) for i, image in enumerate(images[1:])] == [True, True, True, False, False]
    assert kept.full and len(kept) == 4 and kept.frames() == (3, 8) and kept.frames(2) == (7, 8)
    kept.clear()
    assert not kept.full and kept.add(9, images[0])


def test_shuffled_images_are_worth_themselves() -> None:
    worth = [independent(np.random.default_rng(i).normal(0, 1, (64, FEATURES)), REFERENCE) for i in range(20)]
    assert 50 < np.mean(worth) <= 64


def test_a_camera_that_does_not_move_says_as_little_as_one_image() -> None:
    still = np.random.default_rng(1).normal(2, 0.02, (64, FEATURES))
    assert independent(still, REFERENCE) < 1.2
    assert independent(np.zeros((64, FEATURES)), REFERENCE) == pytest.approx(1.0)
    assert independent(still[:1], REFERENCE) == 1.0


def test_neighbours_that_resemble_each_other_count_for_fewer() -> None:
    rng, walk = np.random.default_rng(2), np.zeros((400, FEATURES))
    for i in range(1, 400):
        walk[i] = 0.9 * walk[i - 1] + np.sqrt(1 - 0.81) * rng.normal(0, 1, FEATURES)
    assert 400 * 0.03 < independent(walk, REFERENCE) < 400 * 0.12  # (1 - 0.9) / (1 + 0.9) = 0.053


@settings(deadline=None)
@given(st.integers(1, 40), st.floats(0, 10), st.integers(0, 99))
def test_the_worth_is_between_one_and_all(n: int, size: float, seed: int) -> None:
    worth = independent(np.random.default_rng(seed).normal(0, size, (n, FEATURES)), REFERENCE)
    assert 1 <= worth <= n


def test_old_evidence_counts_for_no_more_than_the_limit() -> None:
    known = Evidence.of(np.ones((2, 3)), 900.0, np.full(2, 0.5))
    assert known.worth(512).frames == 512 and known.worth(1000).frames == 900
    copy = known.copy()
    copy.moments[:] = 0
    assert known.moments.all()
