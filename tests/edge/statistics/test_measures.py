"""The two ways to measure: the graph in one pass, the taps until they stay. Both end at one network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge.engine import EngineFactory
from edge.serving import ServingState
from edge.statistics import IteratedTaps, StatisticsGraph, estimate, measure_of
from refold import Bundle
from refold.bundle import write_bundle
from refold.errors import BundleError
from refold.statistics import StatisticsModel


def graph_of(bundle: Bundle, memory: int = 2**26, **more: object) -> StatisticsGraph:
    return StatisticsGraph(bundle, StatisticsModel.of(bundle).layout, memory=memory, **more)  # type: ignore[arg-type]


def taps_of(bundle: Bundle, **more: object) -> IteratedTaps:
    factory, model = EngineFactory(bundle), StatisticsModel.of(bundle)
    return IteratedTaps(model.layout, factory.build_taps, factory.build, bundle.preprocess, **more)  # type: ignore[arg-type]


def test_the_graph_and_the_taps_find_the_same_statistics(exported, foggy):
    model = StatisticsModel.of(exported)
    one, many = (estimate(m, model, ServingState(), foggy) for m in (graph_of(exported), taps_of(exported)))
    deviation = np.sqrt(model.layout.row("variance", {}))
    assert np.abs((one.moments[0] - many.moments[0]) / deviation).mean() < 0.03
    np.testing.assert_allclose(one.mix, many.mix, atol=0.03)
    assert (one.logits.argmax(1) == many.logits.argmax(1)).mean() > 0.9
    shifted = np.abs((one.moments[0] - model.layout.row("mean", {})) / deviation).mean()
    assert shifted > 0.1  # there was something to find


def test_what_is_served_gives_the_answers_that_were_measured(exported, foggy):
    model, factory = StatisticsModel.of(exported), EngineFactory(exported)
    found = estimate(graph_of(exported), model, ServingState(), foggy)
    states, share = model.served({}, found.moments, found.frames, found.mix)
    engine = factory.build(ServingState(states))
    own = engine.run(exported.preprocess.apply(np.stack(foggy)))
    assert (own.argmax(1) == found.logits.argmax(1)).mean() > 0.97
    assert np.abs(own - found.logits).mean() < 0.1 * found.logits.std()
    assert (share > 0).any()


def test_chunks_come_close_to_all_at_once(exported, foggy):
    model = StatisticsModel.of(exported)
    whole, parts = graph_of(exported), graph_of(exported, memory=1)
    assert parts.chunk == 8 and whole.chunk >= len(foggy)
    a, b = (estimate(m, model, ServingState(), foggy) for m in (whole, parts))
    deviation = np.sqrt(model.layout.row("variance", {}))
    assert np.abs((a.moments[0] - b.moments[0]) / deviation).mean() < 0.08


def test_images_known_before_are_counted_in(exported, foggy):
    model, measure = StatisticsModel.of(exported), graph_of(exported)
    first = estimate(measure, model, ServingState(), foggy[:24])
    both = estimate(measure, model, ServingState(), foggy[24:], known=first)
    alone = estimate(measure, model, ServingState(), foggy[24:])
    assert both.frames == 48 and first.frames == alone.frames == 24
    np.testing.assert_allclose(both.moments, 0.5 * (first.moments + both.alone), rtol=1e-5, atol=1e-6)
    deviation = np.sqrt(model.layout.row("variance", {}))
    assert np.abs((both.alone[0] - alone.moments[0]) / deviation).mean() < 0.1


def test_a_measurement_can_be_ended(exported, foggy):
    for measure in (graph_of(exported, stopped=lambda: True), taps_of(exported, stopped=lambda: True)):
        with pytest.raises(InterruptedError):
            estimate(measure, StatisticsModel.of(exported), ServingState(), foggy)


def test_a_release_with_other_activation_scales_is_measured_with_them(exported, foggy):
    model, measure = StatisticsModel.of(exported), graph_of(exported)
    first = exported.norms.activations[0]
    coarse = ServingState({}, (replace(first, scale=first.scale * 8),))
    plain = estimate(measure, model, ServingState(), foggy)
    other = estimate(measure, model, coarse, foggy)
    assert np.abs(plain.logits - other.logits).max() > 0
    again = estimate(measure, model, ServingState(), foggy)
    np.testing.assert_array_equal(plain.logits, again.logits)


def test_which_way_a_bundle_has(exported, bundle, factory):
    assert isinstance(measure_of(EngineFactory(exported), StatisticsModel.of(exported), 32), StatisticsGraph)
    older = StatisticsModel.of(bundle)
    assert isinstance(measure_of(factory, older, 32), IteratedTaps)
    assert older.class_moments.count == 1 and (older.strength < 0.5).all()


def test_a_damaged_graph_is_said(exported, foggy, tmp_path):
    parts = {p.path: exported.read(p.path) for p in exported.parts}
    parts[exported.manifest.statistics] = parts[exported.manifest.statistics][:-200]
    broken = write_bundle(tmp_path / "broken.refold", exported.manifest.__class__.FromString(exported._manifest_bytes), parts)
    with pytest.raises(BundleError):
        estimate(graph_of(broken), StatisticsModel.of(broken), ServingState(), foggy)
