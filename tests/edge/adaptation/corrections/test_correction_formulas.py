"""LAME, T3A and AdaNPC against their formulae, written out by hand or in a few independent lines; what all of them promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.adaptation.corrections import CORRECTIONS, T3A, AdaNPC, Lame
from edge.adaptation.corrections.adanpc import AdaNPCSettings
from edge.adaptation.corrections.correction import direction
from edge.adaptation.corrections.lame import LameSettings, laplacian_answers, rbf_affinity, squared_distances
from edge.adaptation.corrections.t3a import T3ASettings


def softmax(z):
    e = np.exp(np.asarray(z, np.float64) - np.max(z))
    return e / e.sum()


def shown(correction, logits):
    correction.observe(np.asarray(logits, np.float32), softmax(logits).astype(np.float32))
    return correction.corrected()


# LAME -------------------------------------------------------------------------------------------------------------------------


def test_one_step_of_the_fixed_point_by_hand():
    p = np.array([[0.6, 0.4], [0.2, 0.8]])
    w = np.array([[0.0, 1.0], [1.0, 0.0]])
    # softmax(ln p + w p): the first row is drawn by (0.2, 0.8), the second by (0.6, 0.4)
    first = np.array([0.6 * math.exp(0.2), 0.4 * math.exp(0.8)])
    second = np.array([0.2 * math.exp(0.6), 0.8 * math.exp(0.4)])
    np.testing.assert_allclose(laplacian_answers(p, w, iterations=1), [first / first.sum(), second / second.sum()], rtol=1e-6)


def test_the_end_is_a_fixed_point_and_lowers_the_energy():
    rng = np.random.default_rng(3)
    p = np.apply_along_axis(softmax, 1, rng.normal(0, 1, (12, 4)))
    w = np.abs(rng.normal(0, 0.2, (12, 12)))
    w = (w + w.T) / 2
    z = laplacian_answers(p, w, 1000, 1e-15)
    np.testing.assert_allclose(z, np.apply_along_axis(softmax, 1, np.log(p + 1e-10) + w @ z), atol=1e-6)

    def energy(z):  # the formula's own, of a symmetric w
        return float((z * (np.log(z) - np.log(p + 1e-10))).sum() - 0.5 * np.einsum("ij,ic,jc->", w, z, z))

    assert energy(z) < energy(p)


def test_affinity_by_hand():
    squared = np.array([[0.0, 1.0, 9.0], [1.0, 0.0, 4.0], [9.0, 4.0, 0.0]])
    sigma = (1 + 1 + 2) / 3  # distance to the second nearest, oneself counted
    np.testing.assert_allclose(rbf_affinity(squared, 2), np.exp(-squared / (2 * sigma**2)), rtol=1e-12)
    np.testing.assert_allclose(rbf_affinity(squared, 50), np.exp(-squared / (2 * ((3 + 2 + 3) / 3) ** 2)), rtol=1e-12)
    assert rbf_affinity(np.zeros((3, 3)), 2).tolist() == np.ones((3, 3)).tolist()  # one frame for ever


def test_the_newest_frame_of_the_window_is_answered_as_the_batch_would_be():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20, 5)).astype(np.float32)
    lame = Lame(5, LameSettings(window=8))
    for i, row in enumerate(logits):
        answer = shown(lame, row)
        some = logits[max(i - 7, 0) : i + 1]
        units = np.stack([direction(r) for r in some]).astype(np.float64)
        squared = ((units[:, None] - units[None]) ** 2).sum(-1)
        p = np.apply_along_axis(softmax, 1, some)
        np.testing.assert_allclose(answer, laplacian_answers(p, rbf_affinity(squared, 5))[-1], atol=2e-4)


def test_distances_are_those_of_directions():
    rng = np.random.default_rng(5)
    rows = np.concatenate([rng.normal(0, 3, (6, 4)), np.full((1, 4), 2.0)]).astype(np.float32)
    units = np.stack([direction(r) for r in rows]).astype(np.float64)
    np.testing.assert_allclose(squared_distances(rows), ((units[:, None] - units[None]) ** 2).sum(-1), atol=1e-6)


def test_a_doubtful_frame_among_its_like_takes_their_class():
    lame = Lame(3)
    for row in np.array([4.0, 3.0, -3.0]) + np.random.default_rng(0).normal(0, 0.5, (40, 3)):
        shown(lame, row)
    assert softmax([3.0, 3.2, -3.0]).argmax() == 1 and shown(lame, [3.0, 3.2, -3.0]).argmax() == 0


# T3A --------------------------------------------------------------------------------------------------------------------------


def test_templates_by_hand():
    t3a = T3A(2, T3ASettings(supports=2))
    axis = np.array([0.5, -0.5]) / math.sqrt(0.5)
    first = shown(t3a, [3.0, 1.0])  # joins class 0; two classes have one direction only, so the template stays
    np.testing.assert_allclose(first, softmax([np.array([1.0, -1.0]) @ axis, -np.array([1.0, -1.0]) @ axis]), rtol=1e-6)


def test_the_surest_frames_of_a_class_make_its_template():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (60, 4)).astype(np.float32)
    t3a = T3A(4, T3ASettings(supports=3))
    for row in logits:
        answer = shown(t3a, row)
    entropies = [-float((softmax(r) * np.log(softmax(r))).sum()) for r in logits]
    templates = []
    for c in range(4):
        own = sorted((e, i) for i, (e, r) in enumerate(zip(entropies, logits, strict=True)) if r.argmax() == c)[:3]
        axis = np.eye(4)[c] - 0.25
        total = axis / np.linalg.norm(axis)
        for _, i in own:
            centred = logits[i] - logits[i].mean()
            total = total + centred / np.linalg.norm(centred)
        templates.append(total / np.linalg.norm(total))
    last = logits[-1] - logits[-1].mean()
    np.testing.assert_allclose(answer, softmax(np.stack(templates) @ last), atol=1e-5)


def test_supports_shrink_with_the_number_of_classes_and_never_vanish():
    assert T3A(10).supports == 20 and T3A(1000).supports == 1 and T3A(300).supports == 11
    assert T3A(1000).memory_bytes < 20 * 2**20


# AdaNPC -----------------------------------------------------------------------------------------------------------------------


def test_votes_by_hand():
    npc = AdaNPC(2, AdaNPCSettings(memory=4, neighbours=2, temperature=0.5))
    answer = shown(npc, [2.0, 0.0])  # cosines 1 and -1 with the two axes
    weights = softmax([1 / 0.5, -1 / 0.5])
    votes = np.minimum(weights + 1e-5, 1.0)
    np.testing.assert_allclose(answer, votes / votes.sum(), rtol=1e-5)
    again = shown(npc, [2.0, 0.0])  # both neighbours are of class 0 now: the axis and the frame
    np.testing.assert_allclose(again, np.array([1.0, 1e-5]) / (1.0 + 1e-5), rtol=1e-4)


def test_the_oldest_frame_goes_and_the_axes_stay():
    npc = AdaNPC(3, AdaNPCSettings(memory=2, neighbours=1))
    for logits in ([5.0, 0, 0], [0, 5.0, 0], [0, 0, 5.0]):
        shown(npc, logits)
    kept = {tuple(np.round(v, 4)) for v in npc._vectors}
    assert tuple(np.round(direction(np.array([0, 5.0, 0], np.float32)), 4)) in kept and len(npc._vectors) == 5


def test_calibration_images_vote_and_stay():
    known = np.array([[4.0, 3.0, 0.0], [np.nan, 0, 0], [0.0, 1.0, 3.0]], np.float32)
    npc = AdaNPC(3, AdaNPCSettings(memory=2, neighbours=1), known)
    assert npc._labels[:5].tolist() == [0, 1, 2, 0, 2]  # axes, then the two that are finite
    for logits in ([0, 5.0, 0], [0, 0, 5.0], [0, 5.0, 0]):
        shown(npc, logits)
    assert shown(npc, [3.0, 3.1, 0.0]).argmax() == 0  # nearest is the calibration image, not an axis


def test_memory_shrinks_with_the_number_of_classes():
    assert AdaNPC(10).capacity == 1000 and AdaNPC(10_000).capacity == 104


# All --------------------------------------------------------------------------------------------------------------------------

ROW = st.lists(st.floats(-60, 60, width=32), min_size=5, max_size=5)


@pytest.mark.parametrize("name", CORRECTIONS)
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=100))
def test_probabilities_sum_to_one_and_memory_stays(name, rows):
    correction = CORRECTIONS[name](5, None)
    before = correction.memory_bytes
    for row in rows:
        p = shown(correction, row)
        assert p.dtype == np.float32 and p.shape == (5,) and np.isfinite(p).all() and (p >= 0).all()
        assert float(p.sum()) == pytest.approx(1.0, abs=1e-5)
    assert correction.memory_bytes == before


@pytest.mark.parametrize("name", CORRECTIONS)
def test_the_first_frame_is_answered_as_the_engine_did_and_forgetting_begins_anew(name):
    rng = np.random.default_rng(2)
    correction = CORRECTIONS[name](6, None)
    rows = rng.normal(0, 3, (30, 6)).astype(np.float32)
    first = shown(correction, rows[0])
    assert first.argmax() == rows[0].argmax()
    for row in rows:
        shown(correction, row)
    correction.forget()
    np.testing.assert_array_equal(shown(correction, rows[0]), first)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_the_mean_of_the_logits_is_not_seen(name):
    rng = np.random.default_rng(4)
    one, other = CORRECTIONS[name](4, None), CORRECTIONS[name](4, None)
    for row in rng.normal(0, 2, (40, 4)).astype(np.float32):
        np.testing.assert_allclose(shown(one, row), shown(other, row + np.float32(7)), atol=1e-3)
