"""What is served for what was observed: against the formula written out, and at its ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statistics_of import CLASSES, class_moments, table

from refold.statistics import Layout, expectation, posterior, served_states, within_trust

MIXES = st.lists(st.floats(0.02, 1), min_size=CLASSES, max_size=CLASSES).map(lambda v: np.array(v) / sum(v))


def written_out(layout, moments, mix, concentration, images, d, noise, explained):
    """lambda (lambda I + noise I + B^T B)^-1 d for each site, with B^T B the covariance of Dirichlet mixes."""
    mean, _ = moments.moments(mix)
    deviation = np.sqrt(layout.row("variance", {}))
    covariance = (np.diag(mix) - np.outer(mix, mix)) / (concentration + 1)
    out = np.zeros(layout.channels)
    for i, cut in enumerate(layout.slices):
        m = ((moments.mean - mean) / deviation)[:, cut]
        spread = m.T @ covariance @ m
        lam = max((d[cut] ** 2).mean() - explained[i], 0)
        n = len(d[cut])
        out[cut] = lam * np.linalg.solve((lam + noise[i]) * np.eye(n) + spread, d[cut])
    return out * deviation


@settings(deadline=None, max_examples=60)
@given(mix=MIXES, concentration=st.floats(0, 200), images=st.floats(1, 500), seed=st.integers(0, 999), size=st.floats(0, 3))
def test_the_shift_is_the_posterior_mean(mix, concentration, images, seed, size):
    layout = Layout(table())
    moments = class_moments(layout)
    expected = expectation(moments, layout, mix, concentration, images)
    d = np.random.default_rng(seed).normal(0, size, layout.channels)
    observed = expected.mean + d * np.sqrt(layout.row("variance", {}))
    base = layout.row("mean", {}), layout.row("variance", {})
    found = posterior(layout, expected, observed, expected.variance, *base, np.ones(2))
    wanted = written_out(layout, moments, mix, concentration, images, d, expected.means.noise, expected.means.explained)
    np.testing.assert_allclose(found.mean - base[0], wanted, rtol=1e-6, atol=1e-9)
    assert ((found.share >= 0) & (found.share <= 1)).all()


@settings(deadline=None, max_examples=60)
@given(mix=MIXES, other=MIXES)
def test_another_mix_of_known_classes_moves_little_and_the_expected_one_nothing(mix, other):
    layout = Layout(table())
    moments = class_moments(layout)
    base = layout.row("mean", {}), layout.row("variance", {})
    told = expectation(moments, layout, mix, 32, 64)
    same = posterior(layout, told, told.mean, told.variance, *base, np.ones(2))
    np.testing.assert_allclose(same.mean, base[0])
    np.testing.assert_allclose(same.variance, base[1])
    flat = expectation(moments, layout, moments.flat, 2, 64)
    mean, variance = moments.moments(other)
    found = posterior(layout, flat, mean, variance, *base, np.ones(2))
    plain = mean - base[0]
    assert np.linalg.norm(found.mean - base[0]) <= 0.75 * np.linalg.norm(plain) + 1e-9


def test_a_shift_beside_the_directions_of_the_mix_is_kept_almost_whole():
    layout = Layout(table())
    moments = class_moments(layout)
    expected = expectation(moments, layout, moments.flat, 2, 64)
    base = layout.row("mean", {}), layout.row("variance", {})
    for cut in layout.slices:
        basis = expected.means.directions[: CLASSES - 1, cut]
        d = np.linalg.svd(basis)[2][-1] * 6  # orthogonal to every direction
        observed = expected.mean.copy()
        observed[cut] += d * np.sqrt(base[1][cut])
        found = posterior(layout, expected, observed, expected.variance, *base, np.ones(2))
        np.testing.assert_allclose((found.mean - base[0])[cut], (observed - expected.mean)[cut], rtol=0.06)


def test_half_the_strength_is_half_the_shift_and_no_strength_is_the_base():
    layout = Layout(table())
    moments = class_moments(layout)
    expected = expectation(moments, layout, moments.flat, 8, 64)
    base = layout.row("mean", {}), layout.row("variance", {})
    observed = expected.mean + np.random.default_rng(3).normal(0, 2, layout.channels)
    whole, half, none = (
        posterior(layout, expected, observed, 4 * expected.variance, *base, np.full(2, w)) for w in (1.0, 0.5, 0.0)
    )
    np.testing.assert_allclose(half.mean - base[0], 0.5 * (whole.mean - base[0]))
    np.testing.assert_array_equal(none.mean, base[0])
    np.testing.assert_array_equal(none.variance, base[1])
    assert (whole.variance > base[1]).all()


def test_served_states_are_admissible_however_wild_the_observation():
    norms = table()
    layout = Layout(norms)
    moments = class_moments(layout)
    expected = expectation(moments, layout, moments.flat, 8, 64)
    base = layout.row("mean", {}), layout.row("variance", {})
    for variance in (np.zeros(layout.channels), np.full(layout.channels, 1e9)):
        found = posterior(layout, expected, expected.mean + 3, variance, *base, np.ones(2))
        states = served_states(layout, {}, found)
        norms.check({s.name: within_trust(s, states[s.name], norms.trust_ratio) for s in layout.sites})


@pytest.mark.parametrize("concentration", [1.0, 10.0, 100.0])
def test_the_uncertainty_is_that_of_dirichlet_mixes(concentration):
    layout = Layout(table())
    moments = class_moments(layout)
    mix = np.array([0.4, 0.3, 0.2, 0.1])
    expected = expectation(moments, layout, mix, concentration, 64)
    drawn = np.random.default_rng(0).dirichlet(concentration * mix, 200_000) @ moments.mean
    deviation = np.sqrt(layout.row("variance", {}))
    for i, cut in enumerate(layout.slices):
        v, t = expected.means.directions[:, cut], expected.means.uncertainty[i]
        covariance = np.cov(((drawn - expected.mean) / deviation)[:, cut].T)
        np.testing.assert_allclose(v.T @ np.diag(t) @ v, covariance, atol=0.02 * covariance.max())


def test_a_channel_that_never_varied_at_export_says_nothing():
    """Its variance is 0 here as it was there: a ratio of rounding errors, which would make the whole site look shifted."""
    layout = Layout(table())
    moments = class_moments(layout)
    moments.variance[:, 2], moments.mean[:, 2] = 1e-12, 0.0  # as it is measured
    expected = expectation(moments, layout, moments.flat, 8, 64)
    base = layout.row("mean", {}), layout.row("variance", {})
    observed = expected.variance.copy()
    observed[2] = 0.0
    found = posterior(layout, expected, expected.mean, observed, *base, np.ones(2))
    assert (found.share == 0).all()
    assert found.mean[2] == base[0][2] and found.variance[2] == base[1][2]


@given(images=st.floats(1, 500))
def test_few_calibration_images_make_an_expectation_less_certain(images):
    layout = Layout(table())
    known = class_moments(layout)
    exact = replace(known, counts=np.zeros(CLASSES))
    one = np.eye(CLASSES)[1]
    (a, b), (c, d) = known.chance(one, images), exact.chance(one, images)
    np.testing.assert_allclose(a, c + known.between[1] / known.counts[1])
    np.testing.assert_allclose(b, d + known.spread[1] / known.counts[1])
