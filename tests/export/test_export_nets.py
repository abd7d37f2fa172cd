"""Every family of networks: all integer layers fuse, norms refold bit for bit, batches do not matter."""

from __future__ import annotations

import export_nets
import numpy as np
import onnx
import pytest

from export.checks import perturbed
from export.engines import infer, session
from export.pictures import Pictures
from export.pipeline import Options, export_model, fresh_export
from export.targets import TARGETS
from refold.norms import NormKind

PICTURES = Pictures(export_nets.pictures(48), None)
# integer layers, norm kinds in order
EXPECTED = {
    "residual": (7, ["FOLDED"] * 6),
    "optiona": (4, ["FOLDED"] * 2),
    "inverted": (6, ["FOLDED"] * 5),
    "vgg": (4, ["FOLDED"] * 3),
    "dense": (4, ["BATCH"] * 3),
    "squeeze": (6, ["FOLDED"] * 2),
    "convnext": (5, ["LAYER"] * 3),
    "vit": (8, ["LAYER"] * 4),
    "grouped": (3, ["GROUP", "GROUP", "RMS"]),
    "shuffle": (4, ["FOLDED", "FOLDED", "FOLDED", "BATCH"]),
    "unary": (2, ["FOLDED"]),
    "decomposed": (3, ["FOLDED"]),
}


@pytest.fixture(scope="module", params=EXPECTED)
def exported(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "m.refold"
    return request.param, export_model(export_nets.make(request.param), path, export_nets.PREPROCESS, PICTURES, Options())


def test_a_family_of_networks(exported, x):
    name, done = exported
    layers, kinds = EXPECTED[name]
    checks, table = done.checks["ort-x86-avx2"], done.bundle.norms
    assert checks["integer_layers"] == checks["integer_layers_expected"] == layers
    assert [s.kind for s in table.norms] == [NormKind[k] for k in kinds]
    assert done.bundle.target().updatable
    assert not done.recipe.shared and not done.findings, "an ordinary net, ordinarily given"

    model = done.bundle.read(done.bundle.target().model)
    named = {t.name for t in onnx.load_from_string(model).graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert named == set(table.tensors())

    exported_logits = infer(session(model, table.tensors()), x)
    for seed, strength in enumerate((0.3, 0.05)):
        states = perturbed(table, strength, seed)
        table.check(states)
        ours = infer(session(model, table.tensors(states)), x)
        artefact, integers = fresh_export(done.recipe, states)
        assert np.array_equal(ours, infer(session(artefact.model), x)), "a refolded engine is a fresh export"
        for output, codes in done.recipe.model.weights.items():
            assert np.array_equal(codes.codes, integers.weights[output].codes)
        assert not np.array_equal(ours, exported_logits)


def test_the_answer_does_not_depend_on_the_batch(exported, x):
    _, done = exported
    engine = session(done.bundle.read(done.bundle.target().model), done.bundle.norms.tensors())
    together = infer(engine, x[:8], batch=8)
    single = infer(engine, x[:8], batch=1)
    assert np.array_equal(together, single) or np.abs(together - single).max() < 1e-5 * np.abs(together).max()


def test_tap_channels_follow_the_table(exported, x):
    _, done = exported
    part = done.bundle.target().taps
    channels = sum(s.channels for s in done.bundle.norms.norms if s.kind.has_statistics)
    assert bool(part) == bool(channels)
    if part:
        assert infer(session(done.bundle.read(part), done.bundle.norms.tensors()), x[:2]).shape == (2, 2, channels)


@pytest.mark.parametrize(
    "target", [pytest.param(t, marks=[pytest.mark.slow] if t == "ort-arm64" else []) for t in TARGETS if t != "ort-x86-avx2"]
)  # arm64's integers are vnni's
def test_eight_bit_targets(target, tmp_path):
    net = export_nets.make("residual")
    done = export_model(net, tmp_path / "m.refold", export_nets.PREPROCESS, PICTURES, Options((target,)))
    assert done.bundle.target().weight_bits == 8
    assert max(int(np.abs(w.codes).max()) for w in done.recipe.model.weights.values()) == 127


def test_several_targets_share_the_narrowest_integers(tmp_path):
    options = Options(("ort-arm64", "ort-x86-avx2"))
    done = export_model(export_nets.make("inverted"), tmp_path / "m.refold", export_nets.PREPROCESS, PICTURES, options)
    assert [t.name for t in done.bundle.manifest.targets] == ["ort-arm64", "ort-x86-avx2"]
    assert {t.weight_bits for t in done.bundle.manifest.targets} == {7}
    assert max(int(np.abs(w.codes).max()) for w in done.recipe.model.weights.values()) == 64


def test_layers_kept_in_float(tmp_path):
    done = export_model(export_nets.make("residual"), tmp_path / "m.refold", export_nets.PREPROCESS, PICTURES, Options(
        keep_float=("stem.0",)))  # fmt: skip
    kinds = {s.name: s.kind for s in done.bundle.norms.norms}
    assert kinds["stem.1"] is NormKind.BATCH and kinds["a.1"] is NormKind.FOLDED
    told = {layer.name: layer.runs_in for layer in done.bundle.manifest.layers}
    assert told["stem.0"] == "float: kept so by --keep-float" and told["a.0"] == "int8"


@pytest.mark.parametrize("observer", ["minmax", "percentile", "entropy"])
def test_one_observer(observer, tmp_path):
    options = Options(observer=observer)
    done = export_model(export_nets.make("vgg"), tmp_path / "m.refold", export_nets.PREPROCESS, PICTURES, options)
    assert done.recipe.calibration.chosen == observer and list(done.recipe.calibration.errors) == [observer]
