"""Engines: exact at every state, pre-optimised or not, swapped under load, refused when they make no sense."""

from __future__ import annotations

import logging
import tempfile
import threading
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_disk import SmallDisk
from small_nets import TARGET, images, residual_net, shifted

from edge.engine import EngineFactory, EngineSlot, choose_target
from edge.engine.onnx_graph import OnnxGraph
from edge.engine.pictures import Codes, Scratch
from edge.engine.preoptimised import Scope, disturbed
from edge.engine.session import open_session, session_options
from edge.serving import ServingState
from refold import NormState, Preprocess, write_bundle
from refold.errors import BundleError, GateError, InputError, NormStateError
from refold.norms import unfold_moments


@pytest.fixture(scope="module")
def x(bundle):
    return bundle.preprocess.apply(images(8, 16, seed=5))


def fresh(bundle, states=None, activations=()):
    """A session that knows of no optimised graph: the truth."""
    model = bundle.read(bundle.target(TARGET).model)
    return open_session(model, bundle.norms.tensors(states, activations), session_options())


@pytest.mark.parametrize("seed", range(5))
def test_rebuilt_engines_equal_fresh_sessions(bundle, factory, x, seed):
    states = shifted(bundle.norms, seed)
    engine = factory.build(ServingState(states, release_version=seed))
    truth = fresh(bundle, states).run(None, {"input": x})[0]
    np.testing.assert_array_equal(engine.run(x), truth)
    assert engine.serving.release_version == seed
    assert not np.array_equal(truth, factory.build(ServingState()).run(x))


def test_activation_scales_travel_too(bundle, factory, x):
    states, scales = disturbed(bundle.norms, 3)
    assert factory.runtime.model.scope is Scope.NORMS_AND_SCALES
    np.testing.assert_array_equal(
        factory.build(ServingState(states, scales)).run(x), fresh(bundle, states, scales).run(None, {"input": x})[0]
    )


def test_a_moved_zero_point_takes_the_original_graph(bundle, factory, x):
    """The optimiser dropped a ReLU because its zero point was 0: with another zero point that ReLU is needed again."""
    moved = tuple(replace(a, zero_point=40) for a in bundle.norms.activations if a.tensor == "stem.r")
    truth = fresh(bundle, None, moved).run(None, {"input": x})[0]
    np.testing.assert_array_equal(factory.build(ServingState({}, moved)).run(x), truth)


def test_taps_give_the_moments_of_each_norms_input(bundle, factory, x):
    """Against the same convolution computed here in float64 from what the integers stand for."""
    serving = ServingState(shifted(bundle.norms, 1))
    moments = factory.build_taps(serving).run(x)
    channels = sum(s.channels for s in bundle.norms.norms)
    assert moments.shape == (len(x), 2, channels) and factory.has_taps
    stem = bundle.norms.norms[0]
    mean, variance = unfold_moments(stem, serving.states[stem.name], *moments.mean(0)[:, : stem.channels])
    act = bundle.norms.activations[0]
    codes = np.clip(np.rint(x / np.float32(act.scale)) + act.zero_point, 0, 255)
    real = (codes - act.zero_point) * act.scale
    graph = onnx.load_from_string(bundle.read(bundle.target().model))
    q = next(onnx.numpy_helper.to_array(t) for t in graph.graph.initializer if t.name == "stem.q").astype(float)
    w = q * (stem.sign * stem.weight_scale.astype(float))[:, None, None, None]
    padded = np.pad(real, ((0, 0), (0, 0), (1, 1), (1, 1)))
    y = np.einsum("nchwij,ocij->nohw", np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3)), w)
    np.testing.assert_allclose(mean, y.mean((0, 2, 3)), atol=2e-3)
    np.testing.assert_allclose(variance, y.var((0, 2, 3)), rtol=2e-2, atol=1e-3)


def test_every_convolution_runs_in_integers(factory):
    assert factory.integer_layers >= factory.expected_integer_layers == 5


def test_fewer_integer_layers_are_said_aloud(bundle, tmp_path, caplog):
    manifest = type(bundle.manifest)()
    manifest.CopyFrom(bundle.manifest)
    for layer in manifest.layers:
        layer.runs_in = "int8"
    manifest.layers.add(name="lost", runs_in="int8")
    other = write_bundle(tmp_path / "more.refold", manifest, {p.path: bundle.read(p.path) for p in bundle.parts})
    with caplog.at_level(logging.WARNING):
        EngineFactory(other)
    assert "Only 5 of 7 integer layers" in caplog.text


def test_the_optimised_graph_is_kept_and_a_damaged_one_made_again(bundle, x, tmp_path, caplog):
    states = shifted(bundle.norms, 2)
    first = EngineFactory(bundle, cache=tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    content = kept.read_bytes()
    again = EngineFactory(bundle, cache=tmp_path / "cache")
    np.testing.assert_array_equal(first.build(ServingState(states)).run(x), again.build(ServingState(states)).run(x))
    kept.write_bytes(content[:-9] + b"tampered!")
    with caplog.at_level(logging.WARNING):
        mended = EngineFactory(bundle, cache=tmp_path / "cache")
    assert "damaged" in caplog.text and kept.read_bytes() == content
    np.testing.assert_array_equal(first.build(ServingState(states)).run(x), mended.build(ServingState(states)).run(x))


def test_a_cache_that_cannot_be_written_costs_nothing_else(bundle, x, tmp_path, caplog):
    (tmp_path / "file").write_text("not a directory")
    factory = EngineFactory(bundle, cache=tmp_path / "file" / "cache")
    assert "not kept" in caplog.text
    assert np.isfinite(factory.build(ServingState()).run(x)).all()


def test_swaps_under_load_give_exactly_old_or_new(bundle, factory, x):
    engines = [factory.build(ServingState(shifted(bundle.norms, s), release_version=s)) for s in range(2)]
    answers = [e.run(x[:1]) for e in engines]
    assert not np.array_equal(*answers)
    slot, stop, wrong, served = EngineSlot(engines[0]), threading.Event(), [], []

    def load():
        while not stop.is_set():
            engine = slot.current
            version = engine.serving.release_version
            served.append(version)
            if not np.array_equal(engine.run(x[:1]), answers[version]):
                wrong.append(engine.serving)

    threads = [threading.Thread(target=load) for _ in range(2)]
    for t in threads:
        t.start()
    for i in range(60):
        state = ServingState(shifted(bundle.norms, (i + 1) % 2), release_version=(i + 1) % 2)
        assert slot.swap(factory.build(state)).serving.release_version == i % 2
    stop.set()
    for t in threads:
        t.join()
    assert not wrong and slot.swaps == 60 and set(served) == {0, 1}


def test_the_canary_refuses_engines_that_make_no_sense(bundle, factory):
    factory.canary(factory.build(ServingState(shifted(bundle.norms, 1))))
    dead = {
        s.name: NormState(s.exported.gamma, s.exported.beta - 1e3, s.exported.mean, s.exported.variance)
        for s in bundle.norms.norms
    }
    with pytest.raises(GateError, match="same answer"):
        factory.canary(factory.build(ServingState(dead)))


def test_states_that_do_not_fit_are_refused(bundle, factory):
    site = bundle.norms.norms[0]
    with pytest.raises(NormStateError, match="another model"):
        factory.build(ServingState({site.name: NormState([1.0], [0.0], [0.0], [1.0])}))
    with pytest.raises(InputError, match="does not take an input of shape"):
        factory.build(ServingState()).run(np.zeros((1, 3, 4, 4), np.float32))


def test_a_model_and_a_table_that_disagree_are_refused(bundle, tmp_path):
    model, taps, *_ = residual_net(widths=(8,), classes=5)
    target = bundle.target()
    parts = {p.path: bundle.read(p.path) for p in bundle.parts} | {target.model: model, target.taps: taps}
    with pytest.raises(BundleError, match="disagree about"):
        EngineFactory(write_bundle(tmp_path / "mixed.refold", bundle.manifest, parts))
    parts[target.model] = b"\xff\xffno model"
    with pytest.raises(BundleError, match="not readable as ONNX"):
        EngineFactory(write_bundle(tmp_path / "noise.refold", bundle.manifest, parts))
    parts[target.model] = bundle.read(target.taps).replace(b"GlobalAveragePool", b"LocalAveragePool_")
    with pytest.raises(BundleError, match="does not open"):
        EngineFactory(write_bundle(tmp_path / "odd.refold", bundle.manifest, parts))


def test_the_view_of_onnx_changes_nothing_else(bundle):
    model = bundle.read(bundle.target().model)
    graph = OnnxGraph(model)
    ours, theirs = onnx.load_from_string(graph.with_external([])), onnx.load_from_string(model)
    assert ours == theirs
    assert graph.externals() == set(bundle.norms.tensors())
    assert graph.operators()["Conv"] == 5


@pytest.mark.parametrize(
    ("machine", "features", "have", "chosen"),
    [
        ("x86_64", {"avx2"}, ["ort-x86-avx2", "ort-x86-vnni", "ort-arm64"], "ort-x86-avx2"),
        ("x86_64", {"avx2", "avx512_vnni"}, ["ort-x86-avx2", "ort-x86-vnni"], "ort-x86-vnni"),
        ("aarch64", {"asimd"}, ["ort-x86-avx2", "ort-arm64"], "ort-arm64"),
        ("aarch64", {"asimd"}, ["ort-x86-avx2"], None),
        ("x86_64", {"avx2"}, ["litert-arm64"], None),
        ("x86_64", {"avx2"}, ["tensorrt-x86"], None),
        ("x86_64", {"avx2"}, ["litert", "ort-x86-avx2"], "ort-x86-avx2"),
        ("aarch64", {"asimd"}, ["ort-x86-avx2", "litert"], "litert"),
        ("riscv64", set(), ["ort-x86-avx2", "litert"], "litert"),
    ],
)
def test_the_target_follows_the_machine(bundle, monkeypatch, machine, features, have, chosen):
    import edge.engine.target as target

    monkeypatch.setattr(target.platform, "machine", lambda: machine)
    monkeypatch.setattr(target, "_features", lambda: frozenset(features))
    manifest = type(bundle.manifest)()
    for name in have:
        manifest.targets.add(name=name)
    monkeypatch.setattr(bundle, "manifest", manifest)
    if chosen:
        assert choose_target(bundle) == chosen
    else:
        with pytest.raises(BundleError, match="no target for this machine"):
            choose_target(bundle)


def test_a_target_for_another_architecture_is_refused_even_when_named(bundle, monkeypatch):
    import edge.engine.target as target

    monkeypatch.setattr(target.platform, "machine", lambda: "aarch64")
    with pytest.raises(BundleError, match="for x86, this machine is arm64"):
        choose_target(bundle, TARGET)
    with pytest.raises(BundleError, match="no target 'nope'"):
        choose_target(bundle, "nope")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("with_scales", [False, True])
def test_pictures_take_a_short_way_with_the_same_answers(bundle, factory, seed, with_scales):
    states, scales = disturbed(bundle.norms, seed)
    engine = factory.build(ServingState(states, scales if with_scales else ()))
    pictures = np.random.default_rng(seed).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    assert engine.pictures is not None
    truth = fresh(bundle, states, scales if with_scales else ()).run(None, {"input": bundle.preprocess.apply(pictures)})[0]
    np.testing.assert_array_equal(engine.run_pictures(pictures), truth)
    np.testing.assert_array_equal(engine.run(bundle.preprocess.apply(pictures)), truth)
    with pytest.raises(InputError, match="RGB pictures"):
        engine.run_pictures(pictures[:, :8])


def test_a_moved_zero_point_takes_the_long_way(bundle, factory):
    moved = tuple(replace(a, zero_point=a.zero_point + 3) for a in bundle.norms.activations if a.tensor == "input")
    engine = factory.build(ServingState({}, moved))
    pictures = images(3, 16)
    assert engine.pictures is None
    truth = fresh(bundle, None, moved).run(None, {"input": bundle.preprocess.apply(pictures)})[0]
    np.testing.assert_array_equal(engine.run_pictures(pictures), truth)


@given(st.floats(0.002, 0.2), st.integers(0, 255), st.floats(-1, 1), st.floats(0.05, 2), st.integers(0, 2**32 - 1))
def test_codes_are_the_quantised_preprocessing(scale, zero_point, mean, std, seed):
    scale = float(np.float32(scale))
    preprocess = Preprocess(5, 4, 1 / 255, (mean, mean / 2, 0.0), (std, 1.0, std))
    codes, scratch = Codes(preprocess, scale, zero_point), Scratch(4, 5)
    image = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    codes.fill(image, scratch)
    x = preprocess.apply(image)[0].transpose(1, 2, 0)
    wanted = np.clip(np.rint(x / np.float32(scale)) + zero_point, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(scratch.codes[0], wanted)


def test_a_graph_that_begins_otherwise_has_no_short_way(bundle, factory):
    assert OnnxGraph(bundle.read(bundle.target().model)).fed_with_codes() is None  # not optimised: no Transpose yet
    assert OnnxGraph(bundle.read(bundle.target().taps)).fed_with_codes() is None


def test_no_room_for_temporary_files_costs_only_speed(bundle, x, tmp_path, monkeypatch, caplog):
    with SmallDisk(tmp_path / "disk") as disk:
        disk.fill()
        monkeypatch.setattr(tempfile, "tempdir", str(disk.root))
        factory = EngineFactory(bundle)
        assert "cannot be made" in caplog.text
        monkeypatch.setattr(tempfile, "tempdir", str(disk.root / "none"))
        assert np.array_equal(EngineFactory(bundle).build(ServingState()).run(x), factory.build(ServingState()).run(x))
    monkeypatch.undo()
    assert np.array_equal(EngineFactory(bundle).build(ServingState()).run(x), factory.build(ServingState()).run(x))
