"""The statistics graph of every kind of norm: it is the engine, it computes the posterior, and it sees what the norms see."""

from __future__ import annotations

from dataclasses import replace

import export_nets
import numpy as np
import pytest
import torch
from torch import nn

from export.engines import infer, session
from export.pictures import Pictures
from export.pipeline import make_recipe
from export.quantise import IntegerModel, integer_model
from export.runtimes.ort import OnnxRuntime
from export.statistics.build import Statistics, build_statistics
from export.statistics.check import check_statistics
from export.targets import TARGETS, write
from refold.errors import GateError
from refold.norms import NormKind, unfold_moments
from refold.statistics import OUTPUTS, Layout, expectation, graph_inputs, posterior, unshifted_inputs
from refold.statistics.expectation import Unexplained

NETS = ("residual", "optiona", "inverted", "vgg", "dense", "shuffle", "unary", "decomposed")
TARGET = TARGETS["ort-x86-avx2"]


def built(name: str, *, shifts: bool = False) -> tuple[IntegerModel, Statistics, np.ndarray, np.ndarray]:
    images = export_nets.pictures(48)
    recipe = make_recipe(export_nets.make(name), export_nets.PREPROCESS, Pictures(images, None))
    model, x = recipe.model, export_nets.PREPROCESS.apply(images)
    if shifts:
        model = integer_model(model.graph, model.placement, model.weights, recipe.scales, recipe.qmax, power_of_two=True)
    found = build_statistics(model, x, recipe.calibration.float_logits)
    assert found is not None
    return model, found, x, recipe.calibration.float_logits


def run(statistics: Statistics, x: np.ndarray, given: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    moments, logits = statistics.session.run([OUTPUTS.moments, OUTPUTS.logits], {statistics.input: x, **given})
    return moments.astype(np.float64), logits


def shifted_run(model: IntegerModel, statistics: Statistics, x: np.ndarray, strength: float, known=None, share=0.0):
    layout = Layout(model.table)
    expected = expectation(statistics.moments, layout, statistics.moments.flat, 8.0, len(x))
    strengths = np.full(len(layout.sites), strength)
    given = graph_inputs(layout, {}, expected, strengths, known, share)
    moments, logits = run(statistics, (0.6 * x + 0.4).astype(np.float32), given)
    return layout, expected, strengths, moments, logits


@pytest.mark.parametrize("name", NETS)
def test_the_graph_is_the_engine_and_stays_it_where_it_shifts(name):
    model, statistics, x, logits = built(name)
    numbers = check_statistics("ort", OnnxRuntime(), write(TARGET, model), model, statistics, x, logits)
    assert numbers["statistics_exported"] > 0.99 and numbers["statistics_converged"] > 0.99


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_the_graph_serves_the_posterior_of_what_it_observed(name, strength):
    model, statistics, x, _ = built(name)
    layout, expected, strengths, moments, _ = shifted_run(model, statistics, x, strength)
    base = layout.row("mean", {}), layout.row("variance", {})
    variance = np.maximum(moments[1] - moments[0] ** 2, 0)
    wanted = posterior(layout, expected, moments[0], variance, *base, strengths)
    deviation = np.sqrt(np.maximum(base[1], 1e-12))
    live = layout.live()
    assert np.abs((moments[2] - wanted.mean) / deviation)[live].max() < 2e-3
    inside = live & (wanted.variance > 0.05 * base[1]) & (wanted.variance < 20 * base[1])  # else the trust region decides
    np.testing.assert_allclose(moments[3][inside], wanted.variance[inside], rtol=5e-3)


@pytest.mark.parametrize("name", NETS)
def test_the_tap_model_at_the_served_statistics_sees_the_same_moments(name):
    model, statistics, x, _ = built(name)
    layout, _, _, moments, _ = shifted_run(model, statistics, x, 0.5)
    states = {
        s.name: s.exported.with_statistics(moments[2, c].astype(np.float32), moments[3, c].astype(np.float32))
        for s, c in zip(layout.sites, layout.slices, strict=True)
    }
    artefact = write(TARGET, model)
    taps = session(artefact.taps, model.table.tensors(states) | artefact.codes, exact=True)
    seen = infer(taps, (0.6 * x + 0.4).astype(np.float32)).mean(0, dtype=np.float64).astype(np.float32)
    for site, cut in zip(layout.sites, layout.slices, strict=True):
        mean, variance = unfold_moments(site, states[site.name], seen[0, cut], seen[1, cut])
        live = layout.live()[cut]
        spread = np.sqrt(np.maximum(moments[1, cut] - moments[0, cut] ** 2, 1e-9))
        assert (np.abs(mean - moments[0, cut]) / spread)[live].max() < 0.02, site.name
        np.testing.assert_allclose(np.sqrt(variance)[live], spread[live], rtol=0.05)


def test_its_moments_are_those_of_the_float_layers_run_one_by_one():
    """Each float norm replaces its statistics by the batch's before the next one sees its input."""
    model, statistics, x, _ = built("residual")
    layout = Layout(model.table)
    mean, variance = layout.row("mean", {}), layout.row("variance", {})
    plain = replace(
        expectation(statistics.moments, layout, statistics.moments.flat, 8.0, len(x)),
        mean=mean, variance=variance,
        means=Unexplained.nothing(layout, statistics.moments.count, 1e-9),
        variances=Unexplained.nothing(layout, statistics.moments.count, 1e-9),
    )  # fmt: skip
    x = (0.6 * x + 0.4).astype(np.float32)
    moments, _ = run(statistics, x, graph_inputs(layout, {}, plain, np.ones(len(layout.sites))))
    net, seen = export_nets.make("residual"), {}

    def replaced(norm: nn.BatchNorm2d, given: tuple[torch.Tensor], name: str) -> None:
        z = given[0]
        seen[name] = z.mean((0, 2, 3)).numpy(), z.var((0, 2, 3), unbiased=False).numpy()
        norm.running_mean.copy_(torch.from_numpy(seen[name][0]))
        norm.running_var.copy_(torch.from_numpy(seen[name][1]))

    for name, m in net.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_pre_hook(lambda m, given, name=name: replaced(m, given, name))
    with torch.no_grad():
        net(torch.from_numpy(x))
    for site, cut in zip(layout.sites, layout.slices, strict=True):
        spread = np.sqrt(seen[site.name][1])
        assert np.abs((moments[0, cut] - seen[site.name][0]) / spread).max() < 0.12, site.name
        observed = np.sqrt(moments[1, cut] - moments[0, cut] ** 2)
        np.testing.assert_allclose(observed, spread, rtol=0.12)


def test_known_moments_count_by_their_share():
    model, statistics, x, _ = built("residual")
    layout, _, _, whole, _ = shifted_run(model, statistics, x, 0.5)
    _, _, _, own, _ = shifted_run(model, statistics, x, 0.5, whole[:2], 0.75)
    np.testing.assert_allclose(own[2], whole[2], rtol=1e-3, atol=1e-3)  # joined with themselves they are the same
    first = layout.slices[0]
    other = whole[:2] * np.array([[1.0], [1.2]])
    _, _, _, joined, _ = shifted_run(model, statistics, x, 0.5, other, 1.0)
    assert np.all(joined[3, first] > whole[3, first])


def test_folded_scales_that_are_shifts_are_shifts_here():
    model, statistics, x, logits = built("residual", shifts=True)
    assert all(s.power_of_two for s in model.table.norms if s.kind is NormKind.FOLDED)
    numbers = check_statistics("ort", OnnxRuntime(), write(TARGET, model), model, statistics, x, logits)
    assert numbers["statistics_exported"] > 0.99


def test_a_graph_of_another_model_is_refused():
    _, statistics, x, logits = built("residual")
    other = export_nets.make("residual", seed=1)
    theirs = make_recipe(other, export_nets.PREPROCESS, Pictures(export_nets.pictures(48), None)).model
    with pytest.raises(GateError, match="statistics graph"):
        check_statistics("ort", OnnxRuntime(), write(TARGET, theirs), theirs, statistics, x, logits)


def test_without_norms_that_have_statistics_there_is_none():
    recipe = make_recipe(export_nets.make("vit"), export_nets.PREPROCESS, Pictures(export_nets.pictures(16), None))
    x = export_nets.PREPROCESS.apply(export_nets.pictures(4))
    assert build_statistics(recipe.model, x, recipe.calibration.float_logits[:4]) is None


def test_the_bundle_has_both_parts(residual):
    manifest = residual.bundle.manifest
    assert {manifest.statistics, manifest.class_moments} <= {p.path for p in residual.bundle.parts}
    assert residual.checks["ort-x86-avx2"]["statistics_converged"] > 0.99


def test_unshifted_inputs_at_other_norms_are_the_engine_there():
    model, statistics, x, _ = built("residual")
    layout = Layout(model.table)
    states = {s.name: s.exported.with_statistics(s.exported.mean + 0.1, s.exported.variance * 1.3) for s in layout.sites}
    _, logits = run(statistics, x, unshifted_inputs(layout, statistics.moments.count, states))
    engine = OnnxRuntime().logits(write(TARGET, model), model, x, states)
    np.testing.assert_allclose(logits, engine, atol=1e-3)
