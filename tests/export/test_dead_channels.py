"""Channels that do nothing yet or any more: they export on every target, and the live ones beside them stay updatable."""

from __future__ import annotations

import export_nets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.checks import perturbed
from export.pictures import Pictures
from export.pipeline import Options, export_model, fresh_export
from export.runtimes import runtime_of
from export.targets import target_named, write
from refold import NormSite, NormState, NormTable, refold
from refold.norms import BIAS_LIMIT, ActivationScale, check_state, offset_room

PICTURES = Pictures(export_nets.pictures(24), None)
TARGETS = ("ort-x86-avx2", "litert", "tensorrt")
SIZES = st.sampled_from([0.0, 1e-30, 1e-12, 1e-9, 1e-6, 1e-3, 1.0])


def zero_residual(net):
    for norm in (net.d[1], net.b[1]):
        norm.weight.zero_(), norm.bias.zero_()


def tiny_and_empty(net):
    for part in (net.stem, net.a, net.c):
        part[0].weight[:3] *= 1e-9
        part[0].weight[3] = 0
        part[1].running_mean[:4], part[1].running_var[:4], part[1].bias[:4] = 0, 0, 0
    net.d[1].weight[::2], net.d[1].bias[::4] = 0, 0
    net.d[1].weight[1] *= 1e-12
    net.b[1].running_var[:2] = 1e12


@pytest.mark.parametrize("kill", [zero_residual, tiny_and_empty], ids=lambda f: f.__name__)
def test_a_net_with_dead_channels_exports_everywhere_and_can_be_updated(kill, tmp_path, x):
    net = export_nets.make("residual")
    with torch.no_grad():
        kill(net)
    done = export_model(net, tmp_path / "m.refold", export_nets.PREPROCESS, PICTURES, Options(TARGETS))
    assert set(done.checks) == set(TARGETS)
    states = perturbed(done.bundle.norms, 0.3, seed=1)
    done.bundle.norms.check(states)
    target = target_named("ort-x86-avx2")
    runtime, model = runtime_of(target), done.recipe.model
    ours = runtime.logits(write(target, model), model, x[:4], states)
    assert np.array_equal(ours, runtime.written(fresh_export(done.recipe, states, target)[0], model, x[:4]))
    assert not np.array_equal(ours, runtime.logits(write(target, model), model, x[:4]))


@st.composite
def sites(draw):
    n = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def scaled(values):
        return np.asarray(values * np.array(draw(st.lists(SIZES, min_size=n, max_size=n))), np.float32)

    exported = NormState(
        scaled(rng.normal(0, 1, n)), scaled(rng.normal(0, 1, n)), scaled(rng.normal(0, 1, n)), scaled(rng.uniform(0.1, 2, n))
    )
    xs = float(draw(st.sampled_from([1e-8, 1e-3, 0.02, 1.0])))
    site = NormSite.folded(
        "s", weight_scale=scaled(rng.uniform(1e-3, 1e-2, n)), layer_bias=scaled(rng.normal(0, 0.1, n)), exported=exported,
        input_tensor="x", input_scale=xs, power_of_two=draw(st.booleans()),
    )  # fmt: skip
    return site, xs


@given(sites(), st.floats(0.001, 0.5), st.integers(0, 99))
@settings(max_examples=200)
def test_any_pattern_of_dead_channels_folds_and_moves(made, strength, seed):
    site, xs = made
    folded = refold(site, site.exported, xs)
    assert (folded.weight_scale > 0).all() and (np.abs(folded.bias.astype(np.int64)) <= BIAS_LIMIT).all()
    assert (offset_room(site, site.exported, xs) > 0).all()
    check_state(site, site.exported)
    state = perturbed(NormTable((site,), (ActivationScale("x", xs, 0),)), min(strength, 0.3), seed)["s"]
    check_state(site, state)
    refold(site, state, xs)


def test_a_layer_that_is_dead_altogether_can_be_offset():
    zero = np.zeros(3, np.float32)
    site = NormSite.folded("s", weight_scale=[0.01] * 3, layer_bias=zero, exported=NormState(zero, zero, zero, zero + 1),
                           input_tensor="x", input_scale=0.02)  # fmt: skip
    moved = refold(site, NormState(zero, zero + 0.9, zero, zero + 1), 0.02)
    np.testing.assert_allclose(moved.bias * moved.bias_scale.astype(np.float64), 0.9, rtol=1e-6)


def test_ordinary_channels_keep_the_floors_they_had():
    rng = np.random.default_rng(0)
    exported = NormState(rng.uniform(0.2, 2, 64), rng.normal(0, 1, 64), rng.normal(0, 1, 64), rng.uniform(0.1, 9, 64))
    site = NormSite.folded("s", weight_scale=rng.uniform(1e-3, 1e-2, 64), layer_bias=np.zeros(64), exported=exported,
                           input_tensor="x", input_scale=0.02)  # fmt: skip
    a = exported.gamma.astype(np.float64) / np.sqrt(exported.variance.astype(np.float64) + float(np.float32(1e-5)))
    bias = exported.beta.astype(np.float64) - exported.mean.astype(np.float64) * a
    np.testing.assert_array_equal(site.scale_floor, (np.abs(bias) / (float(np.float32(0.02)) * 2.0**28)).astype(np.float32))


def test_a_dead_channel_never_wakes_with_the_other_sign():
    zero = np.zeros(2, np.float32)
    exported = NormState([0.0, 1.0], [0.0, 0.1], zero, zero + 1)
    site = NormSite.folded("s", weight_scale=[0.01] * 2, layer_bias=zero, exported=exported, input_tensor="x", input_scale=0.02)
    reach = float(site.scale_floor[0]) / 0.01
    check_state(site, NormState([-0.5 * reach, 1.0], exported.beta, zero, zero + 1))
    with pytest.raises(Exception, match="sign of gamma"):
        check_state(site, NormState([-4.0 * reach, 1.0], exported.beta, zero, zero + 1))
