"""Bits by layer: what a plan says, that few bits are few in the bundle, and that an engine of them keeps every promise."""

from __future__ import annotations

import export_nets
import numpy as np
import onnx
import pytest

from edge.engine import EngineFactory
from edge.serving import ServingState
from export.bits import Bits, parse_bits
from export.checks import perturbed
from export.engines import infer, session
from export.given import Given
from export.pictures import Pictures
from export.pipeline import Options, export_model, fresh_export, make_recipe
from export.quantise import WeightCodes
from refold.bundle import Bundle
from refold.errors import BundleError, ModelError, UsageError
from refold.packing import packed_size, weights_from_bytes
from refold.tflite import TfliteFile

PICTURES = Pictures(export_nets.pictures(32), None)


def exported(tmp_path, bits, family="residual", target="ort-x86-avx2", given=None):
    options = Options((target,), "few", bits=parse_bits(bits), min_agreement=0.0)
    return export_model(
        export_nets.make(family), tmp_path / "few.refold", export_nets.PREPROCESS, PICTURES, options, given=given
    )


@pytest.mark.parametrize("words", ["w9", "4", "", "a", "x=", "=w4", "w4a16", "W4"])
def test_words_that_are_no_form(words):
    if words == "=w4":
        assert parse_bits([words]).overall == Bits(4, None)
        return
    with pytest.raises(UsageError, match="not a form"):
        parse_bits([words])


def test_a_line_that_fits_nothing_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"layer9\.\*"):
        exported(tmp_path, ["layer9.*=w4"])


@pytest.mark.parametrize(
    ("family", "bits"),
    [
        ("residual", ["w4a4"]),
        ("inverted", ["w3a6"]),
        ("dense", ["w4a4"]),
        pytest.param("vit", ["w3a6"], marks=pytest.mark.slow),
    ],
)
def test_few_bits_end_to_end(family, bits, tmp_path, x):
    """The self-check has passed when this returns: bit-identity at 1 % and with the student included."""
    done = exported(tmp_path, bits, family)
    bundle = Bundle.open(done.bundle.path)
    wanted = parse_bits(bits).overall
    layers = [layer for layer in bundle.manifest.layers if layer.runs_in == "int8"]
    assert {layer.weight_bits for layer in layers[1:-1]} == {wanted.weights}
    assert layers[0].weight_bits == layers[-1].weight_bits == 7
    packed = weights_from_bytes(bundle.read(bundle.manifest.packed))
    assert len(packed) == len(layers) - 2
    for layer in layers[1:-1]:
        codes = packed[f"{layer.name}.codes"]
        assert len(codes.data) == layer.weight_bytes == packed_size(int(np.prod(codes.shape)), wanted.weights)
    engine = EngineFactory(bundle).build(ServingState())
    twin, _ = fresh_export(done.recipe, {})
    assert np.array_equal(engine.run(x), infer(session(twin.model), x))


@pytest.mark.parametrize("bits", [["w3a4"]])
def test_litert_runs_the_same_few_bits(bits, tmp_path, x):
    """Same integers, same levels: the self-check compares the two runtimes, and both with the student."""
    litert = pytest.importorskip("export.runtimes.litert")
    options = Options(("ort-x86-avx2", "litert"), "few", bits=parse_bits(bits), min_agreement=0.0)
    done = export_model(export_nets.make("residual"), tmp_path / "m.refold", export_nets.PREPROCESS, PICTURES, options)
    assert done.checks["litert"]["argmax_ort-x86-avx2"] >= 0.995
    ours, theirs = (EngineFactory(done.bundle, t).build(ServingState()).run(x) for t in ("ort-x86-avx2", "litert"))
    step = float(ours.max() - ours.min()) / 255
    assert (np.abs(ours - theirs) <= 3 * step).mean() > 0.99
    file = TfliteFile(done.bundle.read("targets/litert/model.tflite"))
    assert file.packed and all(
        not any(file.content[p.start : p.start + p.size]) for p in (file.tensors[i].data for i, _ in file.packed.values())
    )
    states = perturbed(done.bundle.norms, 0.05, seed=3)
    twin, _ = fresh_export(done.recipe, states, done.recipe.targets[1])
    assert not TfliteFile(twin.model).packed
    assert np.array_equal(EngineFactory(done.bundle, "litert").build(ServingState(states)).run(x), litert.infer(twin.model, x))
    with pytest.raises(BundleError, match="disagree about"):
        file.expanded({})


def test_codes_of_activations_never_leave_their_levels(tmp_path, x):
    done = exported(tmp_path, ["w8a3"])
    model = onnx.load_from_string(fresh_export(done.recipe, {})[0].model)
    names = [n.output[0] for n in model.graph.node if n.op_type == "Min"]
    assert names
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    got = session(model.SerializeToString()).run(names, {"input": x})
    assert max(int(g.max()) for g in got) == 7 and all(int(g.max()) <= 7 for g in got)


def test_a_release_reaches_an_engine_of_packed_integers(tmp_path, x):
    done = exported(tmp_path, ["w2a8"])
    states = perturbed(done.bundle.norms, 0.05, seed=3)
    engine = EngineFactory(Bundle.open(done.bundle.path)).build(ServingState(states))
    twin, _ = fresh_export(done.recipe, states)
    assert np.array_equal(engine.run(x), infer(session(twin.model), x))
    assert not np.array_equal(engine.run(x), EngineFactory(done.bundle).build(ServingState()).run(x))


def test_eight_bits_are_as_before(tmp_path, residual):
    """No packed part, no Min: a plan that says nothing changes nothing."""
    assert not residual.bundle.manifest.packed and not residual.bundle.packed_weights()
    operators = {n.op_type for n in onnx.load_from_string(residual.bundle.read("targets/ort-x86-avx2/model.onnx")).graph.node}
    assert "Min" not in operators


def of(recipe, **changed):
    return Given(**{"weights": recipe.model.weights, "scales": recipe.scales, "constants": {}} | changed)


def test_what_a_training_brings_is_taken_as_it_is(tmp_path, x):
    net = export_nets.make("residual")
    recipe = make_recipe(net, export_nets.PREPROCESS, PICTURES, Options(bits=parse_bits(["w4a5"])))
    trained = exported(tmp_path, [], given=of(recipe))
    assert {w.bits for w in trained.recipe.model.weights.values()} == {4, 7}
    assert dict(trained.recipe.scales) == dict(recipe.scales)
    rounded, _ = fresh_export(recipe, {})
    assert np.array_equal(EngineFactory(trained.bundle).build(ServingState()).run(x), infer(session(rounded.model), x))


def test_asymmetric_integers_of_a_training(tmp_path, x):
    """q − z of 4 bits lies in −15..15: it is written with zero point 0, and packed in 4 bits all the same."""
    recipe = make_recipe(export_nets.make("residual"), export_nets.PREPROCESS, PICTURES, Options())
    rng, weights = np.random.default_rng(0), {}
    for output, w in recipe.model.weights.items():
        flat = w.codes.reshape(len(w.codes), -1).astype(int)
        low = flat.min(1, keepdims=True)
        q = np.rint((flat - low) / np.maximum(flat.max(1, keepdims=True) - low, 1) * 15)
        zero = rng.integers(3, 12, (len(q), 1))
        weights[output] = WeightCodes((q - zero).astype(np.int8).reshape(w.codes.shape), w.scale * 8, 4)
    done = exported(tmp_path, [], given=of(recipe, weights=weights))
    packed = weights_from_bytes(done.bundle.read(done.bundle.manifest.packed))
    assert all(p.bits == 4 for p in packed.values()) and len(packed) == len(weights)
    twin, _ = fresh_export(done.recipe, {})
    assert np.array_equal(EngineFactory(done.bundle).build(ServingState()).run(x), infer(session(twin.model), x))


def test_a_training_of_another_model_is_refused(tmp_path):
    recipe = make_recipe(export_nets.make("residual"), export_nets.PREPROCESS, PICTURES, Options())
    first, *others = recipe.model.weights
    wide = {**recipe.model.weights, first: WeightCodes(np.full_like(recipe.model.weights[first].codes, 100), np.ones(1))}
    value = next(iter(recipe.scales))
    for broken, says in (
        ({"weights": {k: recipe.model.weights[k] for k in others}}, "no integers that fit"),
        ({"weights": wide}, "saturating"),
        ({"scales": {k: v for k, v in recipe.scales.items() if k != value}}, "no scale for"),
        ({"constants": {"nothing": np.zeros(1, np.float32)}}, "another model"),
    ):
        with pytest.raises(ModelError, match=says):
            exported(tmp_path, [], given=of(recipe, **broken))
    assert not list(tmp_path.iterdir())
