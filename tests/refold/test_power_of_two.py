"""Folded scales on powers of two: the rounding, the norm it serves, the wire, and bundles that know nothing of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import manifest
from strategies import XS, nudge, rngs, site, widths

from refold import FoldedAffine, NormSite, NormState, refold
from refold.codec import site_from_pb, site_to_pb, table_from_pb
from refold.norms import check_state, nearest_power_of_two, unfold_moments


def shifting(rng: np.random.Generator, n: int, *, dead: bool = False) -> NormSite:
    s = site(rng, n, dead=dead)
    return NormSite.folded(
        s.name, weight_scale=s.weight_scale, layer_bias=s.layer_bias, exported=s.exported, input_tensor="input",
        input_scale=XS, power_of_two=True,
    )  # fmt: skip


def folded(s: NormSite, state: NormState) -> FoldedAffine:
    found = refold(s, state, XS)
    assert isinstance(found, FoldedAffine)
    return found


def shrunk(s: NormState) -> NormState:
    """Admissible, and no dead channel's bias grows."""
    return NormState(
        s.gamma * np.float32(0.83), s.beta * np.float32(0.9), s.mean * np.float32(0.9), s.variance * np.float32(1.1)
    )


@given(st.floats(1e-300, 1e300))
def test_the_nearest_power_of_two_is_the_nearest(value):
    near = float(nearest_power_of_two(np.array([value]))[0])
    assert np.frexp(near)[0] == 0.5
    assert abs(near - value) <= min(abs(near / 2 - value), abs(near * 2 - value))
    assert abs(near / value - 1) <= 1 / 3


def test_the_middle_goes_up_and_powers_stay():
    assert nearest_power_of_two(np.array([0.75, 1.5, 1.0, 2.0**-30, 0.7499, 1.4999])).tolist() == [1, 2, 1, 2**-30, 0.5, 1]


@given(rngs, widths)
def test_every_folded_scale_is_a_power_of_two_near_the_exact_one(rng, n):
    s = shifting(rng, n, dead=True)
    for state in (s.exported, shrunk(s.exported)):
        scale = folded(s, state).weight_scale
        assert (np.frexp(scale)[0] == 0.5).all()
        a = np.abs(state.gamma) / np.sqrt(state.variance.astype(np.float64) + np.float32(s.epsilon))
        exact = s.weight_scale * a
        live = exact > s.scale_floor
        assert (np.abs(scale[live] / exact[live] - 1) <= 1 / 3 + 1e-6).all()
        assert (scale >= s.scale_floor).all()


@given(rngs, widths)
def test_a_channel_keeps_its_mean(rng, n):
    """What gives way is the deviation: at the norm's own mean the layer still gives beta."""
    s = shifting(rng, n)
    state = nudge(rng, s.exported)
    f = folded(s, state)
    step = f.weight_scale.astype(np.float64) * np.float32(XS)
    a = f.weight_scale / s.weight_scale.astype(np.float64) * s.sign
    at_mean = a * (state.mean.astype(np.float64) - s.layer_bias) + f.bias * step
    assert (np.abs(at_mean - state.beta) <= 0.51 * step + 1e-5 * np.abs(a * state.mean) + 1e-6).all()


@given(rngs, widths)
def test_refolding_rounds_as_the_export_did(rng, n):
    """A device that only knows the site from the wire makes the same bytes."""
    s = shifting(rng, n, dead=True)
    again = site_from_pb(type(site_to_pb(s)).FromString(site_to_pb(s).SerializeToString()))
    assert again.power_of_two
    for state in (s.exported, shrunk(s.exported)):
        check_state(again, state)
        ours, theirs = folded(s, state), folded(again, state)
        assert ours.weight_scale.tobytes() == theirs.weight_scale.tobytes() and ours.bias.tobytes() == theirs.bias.tobytes()


@given(rngs, widths)
def test_moments_survive_the_way_through_a_rounded_norm(rng, n):
    s = shifting(rng, n)
    a = folded(s, s.exported).weight_scale / s.weight_scale.astype(np.float64) * s.sign
    mean, variance = rng.normal(0, 3, n), rng.uniform(0.01, 5, n)
    out_mean = a * (mean - s.exported.mean) + s.exported.beta
    out_square = a**2 * variance + out_mean**2
    got_mean, got_variance = unfold_moments(s, s.exported, out_mean.astype(np.float32), out_square.astype(np.float32))
    coarse = 1e-6 * (np.abs(out_mean) + 1) / np.abs(a)
    assert (np.abs(got_mean - mean) <= coarse + 1e-5).all()
    assert (np.abs(got_variance - variance) <= 1e-6 * (out_square + 1) / a**2 + 1e-5 * variance).all()


@given(rngs, widths)
def test_exact_sites_are_untouched_byte_for_byte(rng, n):
    """The field is not on the wire of an exact site, and its absence means exact."""
    s = site(rng, n, dead=True)
    wire = site_to_pb(s).SerializeToString()
    fields = {descriptor.number for descriptor, _ in site_to_pb(s).ListFields()}
    assert 13 not in fields and not site_from_pb(type(site_to_pb(s)).FromString(wire)).power_of_two
    f = folded(s, s.exported)
    a = s.exported.gamma / np.sqrt(s.exported.variance.astype(np.float64) + float(np.float32(s.epsilon)))
    exact = np.maximum(s.weight_scale.astype(np.float64) * np.abs(a), s.scale_floor).astype(np.float32)
    assert f.weight_scale.tobytes() == exact.tobytes()


def test_bundles_made_before_the_field_open_unchanged():
    m = manifest()
    table = table_from_pb(m.norms)
    assert not any(s.power_of_two for s in table.sites)
    assert all(13 not in {d.number for d, _ in s.ListFields()} for s in m.norms.sites)


@pytest.mark.parametrize("gamma", [0.0, 1e-9])
def test_a_dead_channel_keeps_its_offset(gamma):
    exported = NormState([gamma, 1.0], [3.0, 0.1], [0.2, 0.0], [1.0, 1.0])
    s = NormSite.folded(
        "s", weight_scale=[0.01] * 2, layer_bias=[0] * 2, exported=exported, input_tensor="i", input_scale=XS, power_of_two=True
    )
    f = folded(s, exported)
    assert f.bias[0] * f.weight_scale[0].astype(np.float64) * np.float32(XS) == pytest.approx(3.0, rel=1e-6)
    assert np.frexp(f.weight_scale[0])[0] == 0.5


def test_an_integer_layer_without_a_norm_is_on_the_grid_already():
    one, zero = np.ones(3, np.float32), np.zeros(3, np.float32)
    s = NormSite.folded(
        "fc", weight_scale=[2.0**-7] * 3, layer_bias=[0.5, -0.25, 0], exported=NormState(one, zero, zero, one), epsilon=0.0,
        input_tensor="i", input_scale=2.0**-5, has_norm=False, power_of_two=True,
    )  # fmt: skip
    exact, rounded = refold(replace(s, power_of_two=False), s.exported, 2.0**-5), refold(s, s.exported, 2.0**-5)
    assert isinstance(exact, FoldedAffine) and isinstance(rounded, FoldedAffine)
    assert np.array_equal(exact.weight_scale, rounded.weight_scale) and np.array_equal(exact.bias, rounded.bias)
