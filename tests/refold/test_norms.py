"""The one function the product rests on, against plain float arithmetic and against everything it must refuse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from strategies import XS, codes, nudge, rngs, site, state, widths

from refold import ActivationScale, ExplicitAffine, FoldedAffine, NormKind, NormSite, NormState, NormTable, refold
from refold.errors import NormStateError
from refold.norms import BIAS_LIMIT, SiteTensors, check_state, unfold_moments


def integer_layer(folded: FoldedAffine, q: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What an engine does: int32 accumulation, int32 bias, one float scale per channel."""
    return (x.astype(np.int64) @ q.T.astype(np.int64) + folded.bias) * (folded.weight_scale.astype(np.float64) * np.float32(XS))


def float_layer(s: NormSite, st: NormState, q0: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Convolution with the unfolded weights, then BatchNorm by its definition."""
    conv = (x * float(np.float32(XS))) @ (q0 * s.weight_scale[:, None].astype(np.float64)).T + s.layer_bias
    return st.gamma * (conv - st.mean) / np.sqrt(st.variance.astype(np.float64) + np.float32(s.epsilon)) + st.beta


@given(rngs, widths)
def test_folded_layer_computes_the_batch_norm_within_half_a_bias_step(rng, n):
    s = site(rng, n)
    new = nudge(rng, s.exported)
    q0, x = codes(rng, n), rng.integers(0, 256, (5, 27))
    folded = refold(s, new, XS)
    error = np.abs(integer_layer(folded, q0 * s.sign[:, None], x) - float_layer(s, new, q0, x))
    step = folded.weight_scale.astype(np.float64) * np.float32(XS)
    size = np.abs(x).sum(1)[:, None] * 64 * step  # float32 scales: seven digits of the largest sum
    assert (error <= 0.5 * step + 1e-6 * size + 1e-6).all()


@given(rngs, widths)
def test_same_state_gives_the_same_bytes(rng, n):
    s = site(rng, n, dead=True)
    a, b = refold(s, s.exported, XS), refold(s, s.exported, XS)
    assert a.weight_scale.tobytes() == b.weight_scale.tobytes() and a.bias.tobytes() == b.bias.tobytes()
    assert a.weight_scale.dtype == a.bias_scale.dtype == np.float32 and a.bias.dtype == np.int32
    np.testing.assert_array_equal(a.bias_scale, np.float32(XS) * a.weight_scale)


@given(rngs, widths)
def test_exported_and_neighbouring_states_are_admitted(rng, n):
    s = site(rng, n, dead=True)
    check_state(s, s.exported)
    check_state(s, nudge(rng, s.exported))


@given(rngs, widths)
def test_scales_are_positive_and_biases_have_room(rng, n):
    s = site(rng, n, dead=True)
    folded = refold(s, s.exported, XS)
    assert (folded.weight_scale > 0).all() and (np.abs(folded.bias.astype(np.int64)) <= BIAS_LIMIT).all()


def test_a_dead_channel_keeps_its_offset():
    exported = NormState([0.0, 1.0], [2.5, 0.1], [0.3, 0.2], [1.0, 1.0])
    s = NormSite.folded(
        "s", weight_scale=[0.01, 0.01], layer_bias=[0, 0], exported=exported, input_tensor="input", input_scale=XS
    )
    folded = refold(s, exported, XS)
    assert folded.bias[0] * float(folded.bias_scale[0]) == pytest.approx(2.5, rel=1e-6)


@given(rngs, widths)
def test_flipped_sign_is_refused(rng, n):
    s = site(rng, n)
    gamma = s.exported.gamma.copy()
    gamma[0] *= -1
    with pytest.raises(NormStateError, match="sign of gamma") as e:
        check_state(s, replace(s.exported, gamma=gamma))
    assert e.value.code == "sign-flip"


@pytest.mark.parametrize("field", ["gamma", "beta", "mean", "variance"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_refused(field, value):
    s = site(np.random.default_rng(0), 4)
    vector = getattr(s.exported, field).copy()
    vector[2] = value
    with pytest.raises(NormStateError) as e:
        check_state(s, replace(s.exported, **{field: vector}))
    assert e.value.code == "not-finite"
    with pytest.raises(NormStateError):
        refold(s, replace(s.exported, **{field: vector}), XS)


def test_negative_variance_is_refused():
    s = site(np.random.default_rng(0), 4)
    with pytest.raises(NormStateError) as e:
        check_state(s, replace(s.exported, variance=-s.exported.variance))
    assert e.value.code == "negative-variance"


@pytest.mark.parametrize("factor", [9.0, 1 / 9.0])
@pytest.mark.parametrize("kind", [NormKind.FOLDED, NormKind.BATCH, NormKind.LAYER, NormKind.GROUP])
def test_leaving_the_trust_region_is_refused(factor, kind):
    s = site(np.random.default_rng(0), 4)
    if kind is not NormKind.FOLDED:
        empty = np.zeros(0, np.float32)
        exported = s.exported if kind is NormKind.BATCH else NormState(s.exported.gamma, s.exported.beta, empty, empty)
        s = NormSite("n", kind, exported)
    with pytest.raises(NormStateError) as e:
        check_state(s, replace(s.exported, gamma=s.exported.gamma * np.float32(factor)))
    assert e.value.code == "trust-region"


def test_a_dead_channel_may_not_come_alive():
    exported = NormState([1e-12, 1.0], [0.5, 0.1], [0.0, 0.0], [1.0, 1.0])
    s = NormSite.folded("s", weight_scale=[0.01] * 2, layer_bias=[0] * 2, exported=exported, input_tensor="i", input_scale=XS)
    with pytest.raises(NormStateError, match="switched off"):
        check_state(s, replace(exported, gamma=np.array([1.0, 1.0])))


def test_a_bias_beyond_int32_is_refused():
    s = site(np.random.default_rng(0), 3)
    with pytest.raises(NormStateError) as e:
        refold(s, replace(s.exported, beta=np.full(3, 1e12)), XS)
    assert e.value.code == "bias-overflow"


@pytest.mark.parametrize("field", ["gamma", "beta", "mean", "variance"])
def test_a_state_of_another_width_is_refused(field):
    s = site(np.random.default_rng(0), 4)
    with pytest.raises(NormStateError, match="another model"):
        check_state(s, replace(s.exported, **{field: np.ones(5)}))
    with pytest.raises(NormStateError, match="one number per channel"):
        replace(s.exported, **{field: np.ones((2, 2))})


def test_explicit_norms_become_multiply_and_add():
    st = NormState([2.0, -1.0], [0.5, 0.25], [1.0, 2.0], [3.0, 8.0])
    folded = refold(NormSite("bn", NormKind.BATCH, st, epsilon=1.0), st)
    assert isinstance(folded, ExplicitAffine)
    np.testing.assert_allclose(folded.multiply, [1.0, -1 / 3], rtol=1e-7)
    np.testing.assert_allclose(folded.add, [-0.5, 0.25 + 2 / 3], rtol=1e-7)
    layer = refold(NormSite("ln", NormKind.LAYER, NormState([2.0], [3.0])), NormState([4.0], [5.0]))
    assert isinstance(layer, ExplicitAffine) and layer.multiply[0] == 4 and layer.add[0] == 5
    rms = refold(NormSite("r", NormKind.RMS, NormState([2.0], [])), NormState([4.0], []))
    assert rms.named(SiteTensors(multiply="r.m")) == {"r.m": rms.multiply}


@given(rngs, widths)
def test_moments_survive_the_way_through_a_norm(rng, n):
    s = site(rng, n)
    mean, variance = rng.normal(0, 3, n), rng.uniform(0.01, 5, n)
    a = s.exported.gamma / np.sqrt(s.exported.variance.astype(np.float64) + s.epsilon)
    out_mean = a * (mean - s.exported.mean) + s.exported.beta
    out_square = a**2 * variance + out_mean**2
    got_mean, got_variance = unfold_moments(s, s.exported, out_mean.astype(np.float32), out_square.astype(np.float32))
    coarse = 1e-6 * (np.abs(out_mean) + 1) / np.abs(a)  # float32 of the tapped values
    assert (np.abs(got_mean - mean) <= coarse + 1e-5).all()
    assert (np.abs(got_variance - variance) <= 1e-6 * (out_square + 1) / a**2 + 1e-5 * variance).all()


def test_a_dead_channel_keeps_its_statistics_when_tapped():
    exported = NormState([0.0, 1.0], [0.5, 0.1], [7.0, 0.0], [3.0, 1.0])
    s = NormSite.folded("s", weight_scale=[0.01] * 2, layer_bias=[0] * 2, exported=exported, input_tensor="i", input_scale=XS)
    mean, variance = unfold_moments(s, exported, np.array([0.5, 0.3], np.float32), np.array([0.25, 0.5], np.float32))
    assert mean[0] == 7.0 and variance[0] == 3.0 and mean[1] != 0.0


def table(rng: np.random.Generator) -> NormTable:
    s = site(rng, 4)
    head = NormSite.folded(
        "linear",
        weight_scale=[0.01] * 2,
        layer_bias=[0.3, -0.2],
        exported=NormState([1, 1], [0, 0], [0, 0], [1, 1]),
        input_tensor="pool",
        input_scale=0.05,
        epsilon=0.0,
        has_norm=False,
    )
    scales = (
        ActivationScale("input", XS, 3, "input.scale", "input.zp"),
        ActivationScale("pool", 0.05, 0, "pool.scale", "pool.zp"),
    )
    return NormTable((s, head), scales)


def test_a_changed_activation_scale_moves_its_consumers_bias():
    t = table(np.random.default_rng(1))
    before, after = t.tensors(), t.tensors(activations=[ActivationScale("pool", 0.1, 0)])
    assert after["pool.scale"] == np.float32(0.1)
    np.testing.assert_allclose(after["linear.bias"] * 2, before["linear.bias"], atol=1.5)
    np.testing.assert_array_equal(after["linear.bias_scale"], np.float32(0.1) * after["linear.weight_scale"])
    assert set(before) == set(after) and before["input.zp"].dtype == np.uint8


@pytest.mark.parametrize(
    ("change", "sentence"),
    [(ActivationScale("nowhere", 0.1, 0), "no activation"), (ActivationScale("pool", np.nan, 0), "positive"),
     (ActivationScale("pool", 0.0, 0), "positive"), (ActivationScale("pool", 0.1, 256), "positive")],
)  # fmt: skip
def test_impossible_activation_scales_are_refused(change, sentence):
    with pytest.raises(NormStateError, match=sentence):
        table(np.random.default_rng(1)).tensors(activations=[change])


def test_the_table_knows_what_a_release_may_change():
    t = table(np.random.default_rng(1))
    assert [s.name for s in t.norms] == ["layer1.0.conv1"] and set(t.exported_states()) == {"layer1.0.conv1"}
    t.check(t.exported_states())
    with pytest.raises(NormStateError, match="no norm"):
        t.check({"linear": t.site("linear").exported})
    with pytest.raises(NormStateError, match="another model"):
        t.check({"elsewhere": state(np.random.default_rng(0), 4)})
    assert t.site("linear").exported != t.site("layer1.0.conv1").exported


def test_a_release_may_give_a_dead_channel_without_offset_one():
    """Pruned channels have gamma = beta = 0: training moves their beta like any other."""
    exported = NormState([0.0, 1.0], [0.0, 0.5], [0.0, 0.0], [1.0, 1.0])
    s = NormSite.folded("s", weight_scale=[0.01] * 2, layer_bias=[0] * 2, exported=exported, input_tensor="i", input_scale=0.02)
    assert refold(s, exported, 0.02).bias[0] == 0
    moved = NormState([0.0, 1.0], [0.3, 0.5], [0.0, 0.0], [1.0, 1.0])
    check_state(s, moved)
    f = refold(s, moved, 0.02)
    assert f.bias[0] * float(f.bias_scale[0]) == pytest.approx(0.3, rel=1e-6)
