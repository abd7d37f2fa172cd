"""Evidence and overlay: moments come back as the norms' inputs, mixtures are exact, and nothing leaves the trust region."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.adapt import Evidence, TapLayout, mixed_states
from refold import NormKind, NormSite, NormState, NormTable
from refold.errors import InputError
from refold.norms import check_state


def site(rng: np.random.Generator, name: str, channels: int, *, folded: bool = True) -> NormSite:
    state = NormState(
        rng.uniform(0.2, 2, channels) * rng.choice([-1, 1], channels),
        rng.normal(0, 1, channels),
        rng.normal(0, 1, channels),
        rng.uniform(0.05, 3, channels),
    )
    if not folded:
        return NormSite(name=name, kind=NormKind.BATCH, exported=state)
    return NormSite.folded(
        name,
        weight_scale=rng.uniform(1e-3, 1e-2, channels),
        layer_bias=np.zeros(channels),
        exported=state,
        input_tensor="input",
        input_scale=0.03,
    )


def table(rng: np.random.Generator) -> NormTable:
    layer = NormSite(name="l", kind=NormKind.LAYER, exported=NormState(np.ones(4), np.zeros(4)))
    return NormTable((site(rng, "a", 5), layer, site(rng, "b", 7, folded=False)))


def output_moments(layout: TapLayout, x: list[np.ndarray]) -> np.ndarray:
    """What a tap model reports for inputs x[k] (pixels, channels) of its norms, as exported."""
    parts = []
    for s, values in zip(layout.sites, x, strict=True):
        a = s.exported.gamma / np.sqrt(s.exported.variance + s.epsilon)
        y = (values - s.exported.mean) * a + s.exported.beta
        parts.append(np.stack([y.mean(0), (y**2).mean(0)]))
    return np.concatenate(parts, 1).astype(np.float32)


@given(st.integers(0, 2**32 - 1))
def test_taps_of_several_frames_add_up_to_the_moments_of_all_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layout = TapLayout(table(rng))
    assert [s.name for s in layout.sites] == ["a", "b"]
    frames = [[rng.normal(1, 2, (50, s.channels)) for s in layout.sites] for _ in range(3)]
    evidence = Evidence(layout.channels)
    for x in frames:
        evidence.add(layout.unfold(output_moments(layout, x), {}))
    for k, cut in enumerate(layout.slices):
        every = np.concatenate([x[k] for x in frames])
        assert np.allclose(evidence.mean[cut], every.mean(0), atol=2e-3)
        assert np.allclose(evidence.variance[cut], every.var(0), rtol=5e-3, atol=5e-3)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_a_mixture_has_the_moments_of_the_mixed_population_and_is_admissible(seed: int, weight: float) -> None:
    rng = np.random.default_rng(seed)
    norms = table(rng)
    layout = TapLayout(norms)
    evidence = Evidence(layout.channels)
    mean, variance = rng.normal(0, 1, layout.channels), rng.uniform(0.1, 2, layout.channels)
    evidence.add(np.stack([mean, variance + mean**2]))
    states = mixed_states(layout, {}, evidence, weight, 1e6)
    for s, cut in zip(layout.sites, layout.slices, strict=True):
        e = s.exported
        second = (1 - weight) * (e.variance + e.mean**2) + weight * (variance[cut] + mean[cut] ** 2)
        mixed = (1 - weight) * e.mean + weight * mean[cut]
        assert np.allclose(states[s.name].mean, mixed, atol=1e-5)
        assert np.allclose(states[s.name].variance, second - mixed**2, rtol=1e-4, atol=1e-5)
        assert np.array_equal(states[s.name].gamma, e.gamma)


@given(st.integers(0, 2**32 - 1), st.floats(1e-12, 1e12))
def test_statistics_beyond_reason_are_brought_back_into_the_trust_region(seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    norms = table(rng)
    layout = TapLayout(norms)
    evidence = Evidence(layout.channels)
    evidence.add(np.stack([np.zeros(layout.channels), np.full(layout.channels, size)]))
    for name, state in mixed_states(layout, {}, evidence, 1.0, norms.trust_ratio).items():
        check_state(norms.site(name), state, trust_ratio=norms.trust_ratio)


def test_a_dead_channel_keeps_its_exported_statistics() -> None:
    rng = np.random.default_rng(0)
    gamma = np.array([1.0, 1e-12, 0.0], np.float32)
    dead = NormSite.folded(
        "a",
        weight_scale=np.full(3, 1e-3),
        layer_bias=np.zeros(3),
        exported=NormState(gamma, np.ones(3), np.zeros(3), np.ones(3)),
        input_tensor="input",
        input_scale=0.03,
    )
    layout = TapLayout(NormTable((dead,)))
    evidence = Evidence(3)
    evidence.add(np.stack([rng.normal(size=3), np.full(3, 50.0)]))
    state = mixed_states(layout, {}, evidence, 0.5, 8.0)["a"]
    assert state.variance[1] == 1.0
    check_state(dead, state)


def test_evidence_fades_and_forgets() -> None:
    evidence = Evidence(1)
    for value in (0.0, 10.0):
        evidence.add(np.full((2, 1), value), limit=2.0)
    assert evidence.mean[0] == 5.0
    evidence.fade(0.5)
    assert evidence.frames == 1.0
    for _ in range(50):
        evidence.add(np.full((2, 1), 4.0), limit=2.0)
    assert evidence.frames == 2.0
    assert evidence.mean[0] == pytest.approx(4.0)


def test_moments_of_another_model_or_not_finite_are_refused() -> None:
    layout = TapLayout(table(np.random.default_rng(0)))
    with pytest.raises(InputError, match="shape"):
        layout.unfold(np.zeros((2, 3), np.float32), {})
    with pytest.raises(InputError, match="not finite"):
        layout.unfold(np.full((2, layout.channels), np.nan, np.float32), {})
