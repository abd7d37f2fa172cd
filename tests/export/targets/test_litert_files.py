"""Whole nets on LiteRT: ONNX Runtime's answers, patched files equal to fresh ones byte for byte, `--target all`."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import export_nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_nets import CASES, integers
from operator_nets import pictures as small_pictures

import export.pipeline
from demo.models import resnet20
from export.checks import Evidence, agree, perturbed
from export.engines import infer as infer_ort
from export.engines import session
from export.pictures import Pictures
from export.pipeline import Options, export_model, fresh_export, make_recipe
from export.runtimes import Fusion, runtime_of
from export.runtimes.litert import LiteRt, infer
from export.student import Student
from export.targets import TARGETS, Batch, TargetProfile, write
from export.targets.litert_shapes import reshaped_order, same_pads, transposed_order
from refold.bundle import Bundle
from refold.cli import cli
from refold.errors import GateError, ModelError, UsageError
from refold.inspection import inspect
from refold.tflite import TfliteFile

LITERT, ORT = TARGETS["litert"], TARGETS["ort-x86-avx2"]
PICTURES = Pictures(export_nets.pictures(24), None)


@pytest.fixture(scope="module", params=list(export_nets.NETS))
def recipe(request):
    options = Options(("litert",), observer="minmax")
    return make_recipe(export_nets.make(request.param), export_nets.PREPROCESS, PICTURES, options)


def test_a_family_of_nets(recipe):
    """8-bit weight codes; the float model's class, ONNX Runtime's logits and taps, and every norm in place at another state."""
    model, x = recipe.model, export_nets.PREPROCESS.apply(export_nets.pictures(12, seed=3))
    ours, theirs = write(LITERT, model), write(ORT, model)
    tensors = model.table.tensors()
    logits, truth = infer(ours.model, x), infer_ort(session(theirs.model, tensors, exact=True), x)
    step = (truth.max() - truth.min()) / 255
    assert np.sqrt(np.mean((logits - truth) ** 2)) < step and LiteRt().fusion(ours, model).unfused == ()
    assert agree("litert", logits, "ort", truth, step)["argmax_ort"] == 1.0
    if ours.taps:
        moments, wanted = infer(ours.taps, x), infer_ort(session(theirs.taps, tensors, exact=True), x)
        assert moments.shape == wanted.shape and np.abs(moments - wanted).max() < 0.01 * np.abs(wanted).max()
        assert set(TfliteFile(ours.taps).adaptable) == set(tensors)
    states = perturbed(model.table, 0.01)
    fresh, again = fresh_export(recipe, states, LITERT)
    assert TfliteFile(ours.model).patched(model.table.tensors(states)) == fresh.model != ours.model
    assert TfliteFile(ours.taps).patched(model.table.tensors(states)) == fresh.taps if ours.taps else not fresh.taps
    assert again.table.norms[0].exported == states[model.table.norms[0].name]


def test_resnet20():
    """The net and the size people try first: 20 integer layers, shortcuts that slice and pad, 32x32."""
    plan = replace(export_nets.PREPROCESS, width=32, height=32)
    net = export_nets.settled(resnet20().eval(), 32)
    recipe = make_recipe(net, plan, Pictures(export_nets.pictures(16, 32), None), Options(("litert",), observer="minmax"))
    x = plan.apply(export_nets.pictures(8, 32, seed=2))
    artefact = write(LITERT, recipe.model)
    with torch.no_grad():
        truth = Student(recipe.model).eval()(torch.from_numpy(x)).numpy()
    logits = infer(artefact.model, x)
    assert len(TfliteFile(artefact.model).integer_layers()) == len(artefact.fused) >= 20
    assert np.sqrt(np.mean((logits - truth) ** 2)) < 2 * (truth.max() - truth.min()) / 255
    states = perturbed(recipe.model.table, 0.05)
    fresh, _ = fresh_export(recipe, states, LITERT)
    assert TfliteFile(artefact.model).patched(recipe.model.table.tensors(states)) == fresh.model


@pytest.fixture(scope="module")
def residual():
    options = Options(("litert", "ort-x86-avx2"), observer="minmax")
    return make_recipe(export_nets.make("residual"), export_nets.PREPROCESS, PICTURES, options)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), strength=st.floats(0.001, 0.8))
def test_any_admissible_state_patched_is_the_state_written(residual, seed, strength):
    table = residual.model.table
    states = perturbed(table, strength, seed)
    table.check(states)
    written = write(LITERT, residual.model)
    fresh, _ = fresh_export(residual, states, LITERT)
    for ours, theirs in ((written.model, fresh.model), (written.taps, fresh.taps)):
        assert TfliteFile(ours).patched(table.tensors(states)) == theirs
    file = TfliteFile(fresh.model)
    for name, value in table.tensors(states).items():
        np.testing.assert_array_equal(file.values(name), value.reshape(-1), err_msg=name)


def test_only_adaptable_bytes_change(residual):
    model = residual.model
    before = write(LITERT, model).model
    after = TfliteFile(before).patched(model.table.tensors(perturbed(model.table, 0.3)))
    file = TfliteFile(before)
    places = [getattr(file.tensors[i], role) for carriers in file.adaptable.values() for role, i in carriers]
    allowed = np.zeros(len(before), bool)
    for place in places:
        assert not allowed[place.start : place.start + place.size].any()  # no two share a byte
        allowed[place.start : place.start + place.size] = True
    changed = np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8)
    assert len(before) == len(after) and changed.sum() > 100 and not (changed & ~allowed).any()


def test_buffers_lie_on_multiples_of_sixteen_and_layers_keep_their_names(residual):
    file = TfliteFile(write(LITERT, residual.model).model)
    assert all(t.data.start % 16 == 0 for t in file.tensors if t.data.size)
    names = {t.name for t in file.tensors}
    assert {"stem.0", "stem.0.weight", "stem.0.bias", "head.fc", "input", "logits"} <= names
    (entry,), (answer,) = file.inputs, file.outputs
    assert file.tensors[entry].shape == (1, 16, 16, 3) and file.tensors[entry].kind is np.int8
    assert file.tensors[answer].name == "logits" and file.tensors[answer].shape == (1, export_nets.CLASSES)


def test_buffers_behind_the_flatbuffer_are_found(residual):
    """As converters lay out large files."""
    from ai_edge_litert import schema_py_generated as schema
    from flatbuffers import Builder

    content = write(LITERT, residual.model).model
    model = schema.ModelT.InitFromPackedBuf(bytearray(content))
    moved = {i: np.asarray(b.data).tobytes() for i, b in enumerate(model.buffers) if b.data is not None and len(b.data) > 64}

    def laid_out(end: int) -> tuple[bytes, bytes]:
        tail = b""
        for i, data in moved.items():
            model.buffers[i].data, model.buffers[i].offset, model.buffers[i].size = None, end + len(tail), len(data)
            tail += data + b"\0" * (-len(data) % 16)
        builder = Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        body = bytes(builder.Output())
        return body + b"\0" * (-len(body) % 16), tail

    body, tail = laid_out(len(laid_out(1 << 20)[0]))
    foreign = body + tail
    assert len(moved) > 5 and len(body) < len(content)
    states = perturbed(residual.model.table, 0.2)
    x = export_nets.PREPROCESS.apply(export_nets.pictures(4))
    ours = TfliteFile(content).patched(residual.model.table.tensors(states))
    theirs = TfliteFile(foreign).patched(residual.model.table.tensors(states))
    np.testing.assert_array_equal(infer(ours, x), infer(theirs, x))


def test_logits_that_grow_still_have_codes(residual):
    """A release that sharpens the answers must not run into the end of the codes."""
    model, x = residual.model, export_nets.PREPROCESS.apply(export_nets.pictures(8))
    written = write(LITERT, model)
    grown = {s.name: type(s.exported)(s.exported.gamma * 6, s.exported.beta * 6, s.exported.mean, s.exported.variance)
             for s in model.table.norms}  # fmt: skip
    tensors = model.table.tensors(grown)
    ours = infer(TfliteFile(written.model).patched(tensors), x)
    theirs = infer_ort(session(write(ORT, model).model, tensors, exact=True), x)
    assert np.abs(theirs).max() > 1.3 * model.peak and (ours.argmax(1) == theirs.argmax(1)).all()
    assert np.abs(ours - theirs).max() < 0.01 * theirs.std()


# Profiles and --target all ---------------------------------------------------------------------------------------------------


def test_profiles_are_data_that_says_what_it_cannot_mean():
    assert {p.name: p.qmax for p in TARGETS.values()} == {
        "ort-x86-avx2": 64, "ort-x86-vnni": 127, "ort-arm64": 127, "litert": 127, "tensorrt": 127
    }  # fmt: skip
    assert LITERT.batch is Batch.STATIC and "sigmoid" not in LITERT.integer_operators
    with pytest.raises(UsageError, match="4-bit weights have no codes up to 64"):
        TargetProfile("odd", "ort", 64, 4, frozenset())
    with pytest.raises(UsageError, match="there is no operator 'convolve'"):
        TargetProfile("odd", "ort", 64, 7, frozenset({"convolve"}))


def test_all_targets_share_a_bundle_and_agree(residual, npz, tmp_path):
    arguments = ["--calibration", npz, "--preprocess", "16x16,unit", "--observer", "minmax", "--json"]
    path = tmp_path / "all.refold"
    here = f"{export_nets.__file__}:residual"
    done = CliRunner().invoke(
        cli, ["export", here, *map(str, arguments), "--target", "all", "-o", str(path), "--min-agreement", "0"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert set(told["checks"]) == set(TARGETS) and told["refused"] == {}
    assert told["checks"]["litert"]["argmax_ort-x86-avx2"] >= 0.995
    assert told["checks"]["litert"]["perturbed_identical"] == told["checks"]["litert"]["taps_finite"] == 1.0
    bundle = Bundle.open(path)
    assert {t.name for t in bundle.manifest.targets if not t.updatable} == {"tensorrt"}  # there the device decides
    assert bundle.target("litert").model == "targets/litert/model.tflite"
    said = CliRunner().invoke(inspect, [str(path)]).output
    assert all(f"target {name}: 7-bit weights, updatable" in said for name in TARGETS if name != "tensorrt")
    assert "target tensorrt: 7-bit weights" in said and "model.tflite" in said
    out = bundle.extract(tmp_path / "out")
    assert TfliteFile((out / "targets/litert/model.tflite").read_bytes()).operators


@pytest.fixture
def quick(monkeypatch, residual):
    """`export_model` without its minutes: calibrated once, the student written once."""
    recipe = replace(residual, targets=tuple(TARGETS.values()))
    if not STUDENT:
        STUDENT.append(export.pipeline.student_program(residual.model))
    monkeypatch.setattr(export.pipeline, "make_recipe", lambda *_: recipe)
    monkeypatch.setattr(export.pipeline, "student_program", lambda _: STUDENT[0])
    return monkeypatch


STUDENT: list[bytes] = []


@pytest.mark.parametrize("where", ["write", "checks"])
def test_a_target_that_fails_is_left_out_and_said(quick, tmp_path, where):
    if where == "write":

        def refusing(profile, model, **more):
            if profile.runtime == "ort":
                raise ModelError("Layer x is a y, which Refold cannot write.")
            return write(profile, model, **more)

        quick.setattr(export.pipeline, "write", refusing)
    else:
        quick.setattr("export.runtimes.ort.OnnxRuntime.fusion", lambda *_: Fusion({}, ("stem.0",)))
    arguments = (torch.nn.Identity(), tmp_path / "m.refold", export_nets.PREPROCESS, PICTURES)
    done = export_model(*arguments, Options(("all",)))
    assert [t.name for t in done.bundle.manifest.targets] == ["litert", "tensorrt"]
    assert set(done.refused) == {n for n in TARGETS if n.startswith("ort")} and "x" in done.refused["ort-arm64"]
    with pytest.raises((ModelError, GateError)):
        export_model(*arguments, Options(("litert", "ort-arm64")))


def test_nothing_is_written_when_no_target_is_possible(quick, tmp_path):
    def refusing(profile, model, **more):
        raise ModelError(f"{profile.name} cannot.")

    quick.setattr(export.pipeline, "write", refusing)
    with pytest.raises(GateError, match=r"No target is possible\. ort-x86-avx2: ort-x86-avx2 cannot.*litert: litert cannot"):
        export_model(torch.nn.Identity(), tmp_path / "m.refold", export_nets.PREPROCESS, PICTURES, Options(("all",)))
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_said_before_anything_else(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "export.runtimes.litert", None)
    with pytest.raises(UsageError, match=r"Target litert needs .* not installed: pip install 'refold\[litert\]'"):
        make_recipe(export_nets.make("residual"), export_nets.PREPROCESS, PICTURES, Options(("litert",)))


def test_a_float_layer_and_targets_that_disagree_are_refused():
    x = small_pictures()
    model = integers(CASES["conv"], x)
    artefact = write(LITERT, model)
    lying = type(artefact)(artefact.model, artefact.taps, (*artefact.fused, "another"))
    assert runtime_of(LITERT).fusion(lying, model).unfused == ("another",)
    logits = np.eye(4, dtype=np.float32)
    assert Evidence(x, None, logits, logits).step == pytest.approx(1 / 255)
    with pytest.raises(GateError, match=r"litert and ort choose the same class on only 50\.0%"):
        agree("litert", logits, "ort", logits[[0, 1, 3, 2]], 0.1)
    assert agree("litert", logits, "ort", logits[[0, 1, 3, 2]], 1.0) == {"argmax_ort": 1.0}


# Orders ----------------------------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_reshape_that_moves_nothing_is_the_reshape(data):
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=5))
    order = tuple(data.draw(st.permutations(range(len(sizes)))))
    flat = [f for s in sizes for f in ([2, 2] if s == 4 else [s])]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(flat)))) | {0, len(flat)})
    after = [int(np.prod(flat[a:b])) for a, b in itertools.pairwise(cuts)]
    value = np.arange(np.prod(sizes)).reshape(sizes)
    stored = value.transpose(order)
    found = reshaped_order(sizes, after, order)
    if found is None:
        assert order != tuple(range(len(sizes)))
    else:
        assert sorted(found) == list(range(len(after)))
        np.testing.assert_array_equal(stored.reshape([after[axis] for axis in found]), value.reshape(after).transpose(found))
    axes = tuple(data.draw(st.permutations(range(len(sizes)))))
    np.testing.assert_array_equal(value.transpose(axes).transpose(transposed_order(order, axes)), stored)


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.integers(1, 3))
def test_same_gives_as_many_outputs_as_tensorflow(size, kernel, stride, dilation):
    before, after = same_pads(size, kernel, stride, dilation)
    reach = (kernel - 1) * dilation + 1
    assert 0 <= after - before <= 1
    assert (max(size + before + after, reach) - reach) // stride + 1 == -(-size // stride)
