"""The file TensorRT builds from: its structure by NVIDIA's rules, its numbers in ONNX Runtime, its norms by replacement."""

from __future__ import annotations

import json

import export_nets
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from export.bits import parse_bits
from export.checks import perturbed
from export.engines import infer, session
from export.pictures import Pictures
from export.pipeline import Exported, Options, export_model, fresh_export, make_recipe
from export.runtimes.tensorrt import norms_at, replaced
from export.student import Student
from export.targets import target_named, write
from export.targets.tensorrt_rules import violations
from refold.cli import main
from refold.errors import BundleError
from refold.norms import ActivationScale, NormState
from refold.tensorrt import RECIPE, BuildRecipe, RefitSite, symmetric

TENSORRT = target_named("tensorrt")
LAYERS = ("stem.0", "a.0", "b.0", "down.0", "c.0", "d.0", "head.fc")


def run(content, x):
    return infer(session(content, optimise=False), x, batch=1)


def apart(ours, theirs):
    return float(np.sqrt(np.mean((ours - theirs) ** 2)) / theirs.std())


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Exported:
    path = tmp_path_factory.mktemp("trt") / "m.refold"
    options = Options(("ort-x86-vnni", "tensorrt"), "m", tuple("abcde"), observer="minmax")
    return export_model(
        export_nets.make("residual"), path, export_nets.PREPROCESS, Pictures(export_nets.pictures(32), None), options
    )


@pytest.fixture(scope="module")
def model(exported) -> bytes:
    return exported.bundle.read("targets/tensorrt/model.onnx")


@pytest.fixture(scope="module")
def recipe(exported) -> BuildRecipe:
    return BuildRecipe.from_json(exported.bundle.read(f"targets/tensorrt/{RECIPE}"), RECIPE)


def test_the_bundle_says_what_is_proved_and_what_is_not(exported, capsys):
    target, checks = exported.bundle.target("tensorrt"), exported.checks["tensorrt"]
    assert not target.updatable and exported.bundle.target("ort-x86-vnni").updatable
    assert checks["structure_checked"] == checks["exported_identical"] == checks["perturbed_identical"] == 1.0
    assert checks["integer_layers"] == 7 and checks["tap_channels"] == 80 and checks["argmax_ort-x86-vnni"] >= 0.95
    main(["inspect", str(exported.bundle.path)])
    told = capsys.readouterr().out
    assert "target tensorrt: 8-bit weights, updatable once its device has proved it" in told
    assert "targets/tensorrt/build.json" in told


def test_the_recipe_names_scale_and_shift_of_every_norm(exported, recipe, model):
    assert recipe.integer_layers == 7 and recipe.refit == "REFIT_INDIVIDUAL" and recipe.profiles == 0
    assert recipe.sites == tuple(RefitSite.of(s) for s in exported.bundle.norms.norms)
    told = json.loads(exported.bundle.read(f"targets/tensorrt/{RECIPE}"))
    assert told["sites"][0] == {
        "site": "stem.1", "node": "norm/stem.1", "weights": ["norm/stem.1/scale", "norm/stem.1/shift"],
        "initialisers": [f"stem.1.norm.{role}" for role in ("gamma", "beta", "mean", "variance")],
    }  # fmt: skip
    nodes = {n.name: n for n in onnx.load_from_string(model).graph.node}
    for site in recipe.sites:
        assert nodes[site.node].op_type == "BatchNormalization" and tuple(nodes[site.node].input[1:]) == site.initialisers


def test_the_integers_are_those_of_the_weights_alone(exported, model):
    """No sign is multiplied in: where gamma is negative, codes are the other targets' times -1."""
    graph = onnx.load_from_string(model).graph
    held = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    flipped = 0
    for node in exported.recipe.model.graph.nodes:
        if node.output in exported.recipe.model.weights:
            weights, site = exported.recipe.model.weights[node.output], exported.recipe.model.sites[node.output]
            ours = held[f"{node.name}.codes"]
            np.testing.assert_array_equal(ours, weights.codes)
            signs = site.sign.reshape(-1, *[1] * (ours.ndim - 1))
            np.testing.assert_array_equal(ours * signs, exported.recipe.model.codes(node))
            flipped += int((site.sign < 0).sum())
    assert flipped >= 6
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [1, 3, 16, 16]


def test_a_fresh_export_is_the_file_with_other_vectors_byte_for_byte(exported, model, x):
    for strength, seed in ((0.01, 0), (0.3, 1)):
        states = perturbed(exported.bundle.norms, strength, seed)
        artefact, _ = fresh_export(exported.recipe, states, TENSORRT)
        assert artefact.model == replaced(model, norms_at(exported.bundle.norms, states))
        assert artefact.model != model
    assert not np.allclose(run(artefact.model, x), run(model, x), atol=0.05)


def test_a_gamma_of_the_other_sign_is_the_float_net_of_that_gamma(exported, model, x):
    net, site = export_nets.make("residual"), exported.bundle.norms.site("a.1")
    with torch.no_grad():
        net.get_submodule("a.1").weight.neg_()
        truth = net(torch.from_numpy(x)).numpy()
    s = site.exported
    ours = run(replaced(model, norms_at(exported.bundle.norms, {"a.1": NormState(-s.gamma, s.beta, s.mean, s.variance)})), x)
    assert apart(ours, truth) < 0.2 < apart(run(model, x), truth)


def test_what_one_bit_less_costs(exported, model, x):
    """ReLU's codes are 0..127 instead of 0..255: the error of the logits grows by about half (docs/adr/010-tensorrt.md)."""
    with torch.no_grad():
        truth = export_nets.make("residual")(torch.from_numpy(x)).numpy()
    bundle = exported.bundle
    theirs = infer(session(bundle.read(bundle.target("ort-x86-vnni").model), bundle.norms.tensors(), exact=True), x)
    assert apart(theirs, truth) < apart(run(model, x), truth) < 2.5 * apart(theirs, truth)


def test_taps_report_what_the_file_computes(exported, x):
    moments = run(exported.bundle.read("targets/tensorrt/taps.onnx"), x)
    other = exported.bundle.target("ort-x86-vnni").taps
    theirs = infer(session(exported.bundle.read(other), exported.bundle.norms.tensors(), exact=True), x)
    assert moments.shape == theirs.shape and apart(moments, theirs) < 0.05


# Symmetric scales ------------------------------------------------------------------------------------------------------------


@given(
    st.floats(2**-13, 10, width=32), st.integers(1, 8).map(lambda b: 2**b), st.data(),
    st.lists(st.floats(-3000, 3000, width=32), min_size=1, max_size=40),
)  # fmt: skip
def test_a_symmetric_scale_covers_the_range_and_keeps_codes_that_fit(scale, levels, data, values):
    zero_point = data.draw(st.integers(0, levels - 1))
    ours, clamp = symmetric(ActivationScale("x", scale, zero_point), levels)
    low, high = -zero_point * np.float64(scale), (levels - 1 - zero_point) * np.float64(scale)
    assert ours > 0 and ours * 127.5 >= high and ours * 128.5 >= -low
    x = np.asarray(values, np.float32)
    if ours == np.float32(scale):
        inside = np.clip(x, *clamp) if clamp is not None else x
        codes = np.clip(np.rint(inside / ours), -128, 127)
        np.testing.assert_array_equal(codes, np.clip(np.rint(x / np.float32(scale)), -zero_point, levels - 1 - zero_point))
    else:
        assert levels == 256 and clamp is None and zero_point != 128
        assert ours <= 2.01 * np.float32(scale)


def test_activations_of_few_bits_keep_their_codes(x):
    """They fit around zero: the scale is the student's, and a clamp stands where codes end. Weights of few bits are inside.

    The 8-bit activations among them still lose a bit, which coarse rounding behind them amplifies: less than rounding costs.
    """
    options = Options(("tensorrt",), observer="minmax", bits=parse_bits(["w4a4"]))
    made = make_recipe(export_nets.make("vgg"), export_nets.PREPROCESS, Pictures(export_nets.pictures(32), None), options)
    artefact = write(TENSORRT, made.model)
    assert not artefact.packed and made.model.levels
    graph = onnx.load_from_string(artefact.model).graph
    assert not any(t.data_location == TensorProto.EXTERNAL for t in graph.initializer)
    held = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for value, levels in made.model.levels.items():
        scale = made.model.scale_of(value)
        assert held[f"{value}.scale"] == np.float32(scale.scale) and scale.zero_point == 0
        assert held[f"{value}.high"] == np.float32((levels - 1) * scale.scale) and held[f"{value}.low"] == 0
    assert sum(n.op_type == "Clip" for n in graph.node) == len(made.model.levels)
    with torch.no_grad():
        student = Student(made.model).eval()(torch.from_numpy(x)).numpy()
        truth = export_nets.make("vgg")(torch.from_numpy(x)).numpy()
    assert apart(run(artefact.model, x), student) < 0.6 * apart(student, truth)


@pytest.mark.parametrize("net", ["grouped", "convnext", "dense"])
def test_norms_that_cannot_fold_are_nodes_of_their_own(net, x):
    options = Options(("tensorrt",), observer="minmax")
    made = make_recipe(export_nets.make(net), export_nets.PREPROCESS, Pictures(export_nets.pictures(24), None), options)
    artefact = write(TENSORRT, made.model)
    recipe = BuildRecipe.from_json(artefact.beside[RECIPE], RECIPE)
    assert not list(violations(artefact.model, artefact.fused, recipe))
    kinds = {n.op_type for n in onnx.load_from_string(artefact.model).graph.node}
    assert {"grouped": "InstanceNormalization", "convnext": "LayerNormalization", "dense": "BatchNormalization"}[net] in kinds
    assert not kinds & {"Shape", "Gather"}
    states = perturbed(made.model.table, 0.3)
    moved = run(replaced(artefact.model, norms_at(made.model.table, states)), x)
    again, _ = fresh_export(made, states, TENSORRT)
    np.testing.assert_array_equal(moved, run(again.model, x))
    with torch.no_grad():
        truth = export_nets.make(net)(torch.from_numpy(x)).numpy()
    if net != "grouped":  # its softmax is dropped
        assert apart(run(artefact.model, x), truth) < 0.25


# Rules -----------------------------------------------------------------------------------------------------------------------


def _tensor(graph, name, array):
    held = next(t for t in graph.initializer if t.name == name)
    held.CopyFrom(numpy_helper.from_array(array, name))


def _quantise(graph):
    return next(n for n in graph.node if n.op_type == "QuantizeLinear")


def asymmetric(graph):
    _tensor(graph, _quantise(graph).input[2], np.asarray(3, np.int8))


def unsigned(graph):
    _tensor(graph, _quantise(graph).input[2], np.asarray(0, np.uint8))


def negative(graph):
    _tensor(graph, _quantise(graph).input[1], np.asarray(-0.1, np.float32))


def per_channel(graph):
    _tensor(graph, _quantise(graph).input[1], np.full(3, 0.1, np.float32))


def dynamic(graph):
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def shaped(graph):
    graph.node.append(helper.make_node("Shape", ["input"], ["size"], name="size"))


def outside(graph):
    graph.initializer[0].data_location = TensorProto.EXTERNAL


def twice(graph):
    graph.node[1].name = graph.node[0].name


def wide(graph):
    held = next(t for t in graph.initializer if t.name == "stem.0.codes")
    _tensor(graph, held.name, np.full(list(held.dims), -128, np.int8))


def folded(graph):
    norm = next(n for n in graph.node if n.op_type == "BatchNormalization")
    norm.op_type = "Add"


def wrong_vector(graph):
    norm = next(n for n in graph.node if n.op_type == "BatchNormalization")
    norm.input[1], norm.input[2] = norm.input[2], norm.input[1]


def codes_read(graph):
    next(n for n in graph.node if n.op_type == "Add").input[0] = _quantise(graph).output[0]


def float_weights(graph):
    conv = next(n for n in graph.node if n.name == "stem.0")
    conv.input[1] = "stem.0.codes.scale"


def float_behind(graph):
    """A layer whose result is read in float besides."""
    conv = next(n for n in graph.node if n.name == "stem.0")
    graph.node.append(helper.make_node("Neg", [conv.output[0]], ["negative"], name="negative"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (asymmetric, "not symmetric"), (unsigned, "not symmetric"), (negative, "not positive"),
        (per_channel, "a scale for each channel"), (dynamic, "shape that is not known"), (shaped, "computes shapes"),
        (outside, "outside the file"), (twice, "shares its name"), (wide, "not symmetric int8 codes"),
        (folded, "no BatchNormalization of its own"), (wrong_vector, "no BatchNormalization of its own"),
        (codes_read, "without dequantising"), (float_weights, "dequantised codes and weights"),
        (float_behind, "not quantised directly behind"),
    ],
)  # fmt: skip
def test_a_file_that_breaks_a_rule_is_named(model, recipe, spoil, says):
    assert not list(violations(model, LAYERS, recipe))
    loaded = onnx.load_from_string(model)
    spoil(loaded.graph)
    assert any(says in v.what for v in violations(loaded.SerializeToString(), LAYERS, recipe))


def test_a_recipe_that_could_not_be_refitted_is_refused():
    with pytest.raises(BundleError, match="REFIT_IDENTICAL"):
        BuildRecipe(1, (), {}, refit="REFIT_IDENTICAL")
    with pytest.raises(BundleError, match="one at most"):
        BuildRecipe(1, (), {}, profiles=2)
