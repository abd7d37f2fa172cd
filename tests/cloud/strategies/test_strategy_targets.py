"""Modifiers that correct the teachers' predictions: label shift, and weights of several teachers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from cloud.training.strategies.modifiers.label_shift import LabelShift, LabelShiftSettings, corrected
from cloud.training.strategies.modifiers.teacher_weights import (
    TeacherWeights,
    TeacherWeightsSettings,
    aggregate,
    degraded,
    evidence,
    fit,
)


class FakePool:
    """Two teachers: the first knows the label, the second answers the next class, less surely."""

    def __init__(self, count: int, classes: int = 3) -> None:
        self.images = np.zeros((count, 4, 4, 3), np.uint8)
        self.labels = np.arange(count, dtype=np.int64) % classes
        self.images[..., 0] = (self.labels * 80)[:, None, None]
        self.asked = 0

    def votes(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.asked += 1
        kinds = np.arange(len(images)) % 3
        right, wrong = np.eye(3)[kinds], np.eye(3)[(kinds + 1) % 3]
        return np.stack([0.9 * right + 0.1 / 3, 0.4 * wrong + 0.2]).astype(np.float32)


def test_two_rounds_of_expectation_maximisation_by_hand() -> None:
    p, prior = np.array([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]], np.float32), np.array([0.5, 0.5])
    first, mix = corrected(p, prior, 1)
    assert np.allclose(first, p)
    assert np.allclose(mix, [1.7 / 3, 1.3 / 3])
    second, _ = corrected(p, prior, 2)
    odds = p[:, 0] * 1.7 / (p[:, 1] * 1.3)
    assert np.allclose(second[:, 0], odds / (1 + odds), atol=1e-6)


def test_calibrated_predictions_give_the_true_class_mix() -> None:
    """Two classes, one binary observation right in 90 %: with class mix (0.8, 0.2) it reads 0 in 0.74 of cases."""
    p = np.array([[0.9, 0.1]] * 740 + [[0.1, 0.9]] * 260, np.float32)
    moved, mix = corrected(p, np.array([0.5, 0.5]), 1000)
    assert mix == pytest.approx([0.8, 0.2], abs=1e-3)
    assert moved[0, 0] == pytest.approx(0.9 * 0.8 / (0.9 * 0.8 + 0.1 * 0.2), abs=1e-3)


@given(arrays(np.float64, (5, 3), elements=st.floats(0.01, 1)), st.integers(1, 50))
def test_corrected_predictions_stay_probabilities(raw: NDArray[np.float64], rounds: int) -> None:
    p = (raw / raw.sum(1, keepdims=True)).astype(np.float32)
    moved, mix = corrected(p, np.full(3, 1 / 3), rounds)
    assert np.allclose(moved.sum(1), 1, atol=1e-5)
    assert (moved >= 0).all()
    assert mix.sum() == pytest.approx(1)


def test_label_shift_starts_from_the_class_mix_of_calibration_images() -> None:
    pool = FakePool(9)
    p = np.array([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]], np.float32)
    found = LabelShift(LabelShiftSettings(shift_rounds=5)).combined(p[None], p, pool)
    assert np.allclose(found, corrected(p, np.full(3, 1 / 3), 5)[0])


def test_without_weights_every_teacher_counts_alike() -> None:
    votes = torch.from_numpy(FakePool(6).votes(np.zeros((6, 4, 4, 3), np.uint8)))
    assert torch.allclose(aggregate(votes, torch.zeros(3)), votes.mean(0))
    assert torch.allclose(aggregate(votes, torch.tensor([1.0, 2.0, 3.0])).sum(1), torch.ones(6))


def test_evidence_is_certainty_agreement_and_confidence() -> None:
    votes = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    found = evidence(votes)
    assert found[0, 0].tolist() == pytest.approx([1.0, 0.75, 1.0], abs=1e-5)
    assert found[1, 0].tolist() == pytest.approx([0.0, 0.5, 0.5], abs=1e-5)


def test_the_aggregator_learns_which_teacher_is_right() -> None:
    pool = FakePool(60)
    votes, labels = torch.from_numpy(pool.votes(pool.images)), torch.from_numpy(pool.labels)
    w = fit([(votes, labels)])
    right = aggregate(votes, w).gather(1, labels[:, None]).mean()
    assert right > votes.mean(0).gather(1, labels[:, None]).mean() + 0.2


def test_teacher_weights_are_learnt_once_and_only_where_they_can_be() -> None:
    pool, modifier = FakePool(60), TeacherWeights(TeacherWeightsSettings(weights_domains=2, weights_images=30))
    votes = pool.votes(pool.images)
    plain = votes.mean(0)
    pool.labels = np.arange(60) % 3
    first = modifier.combined(votes, plain, pool)
    asked = pool.asked
    assert np.array_equal(modifier.combined(votes, plain, pool), first)
    assert pool.asked == asked == 3
    assert np.allclose(first.sum(1), 1, atol=1e-5)
    assert modifier.combined(votes[:1], plain, pool) is plain
    bare = FakePool(0)
    assert TeacherWeights(TeacherWeightsSettings()).combined(votes, plain, bare) is plain
    assert bare.asked == 0


def test_made_domains_differ_and_keep_their_form() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    rng = np.random.default_rng(1)
    one, two = degraded(images, rng), degraded(images, rng)
    assert one.shape == images.shape
    assert one.dtype == np.uint8
    assert not np.array_equal(one, two)
