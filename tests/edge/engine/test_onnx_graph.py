"""Clips that change no code leave a graph, and no code changes: ONNX Runtime 1.21 to 1.30 does not open some of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import export_nets
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge.engine import EngineFactory
from edge.engine.onnx_graph import OnnxGraph
from edge.engine.session import open_session, session_options
from edge.serving import ServingState
from export.pictures import Pictures
from export.pipeline import Options, export_model
from refold.errors import BundleError
from refold.norms import ActivationScale

F32 = NDArray[np.float32]
BROKEN = {f"1.{minor}.{patch}" for minor in range(21, 31) for patch in range(6)}  # see scripts/ort-versions


def model(low: float | None, high: float | None, codes: type[np.generic] = np.uint8, readers: int = 1) -> bytes:
    """x -> Clip -> QuantizeLinear -> codes, scale and zero point external; with two readers, the Clip's output is told too."""
    bounds = [numpy_helper.from_array(np.float32(v), n) for n, v in (("low", low), ("high", high)) if v is not None]
    outside = []
    code = helper.np_dtype_to_tensor_dtype(np.dtype(codes))
    for name, kind in (("scale", TensorProto.FLOAT), ("zero", code)):
        tensor = TensorProto(name=name, data_type=kind, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="adaptable")
        outside.append(tensor)
    inputs = ["x", "low" if low is not None else "", "high" if high is not None else ""]
    clip, quantise = helper.make_node("Clip", inputs, ["c"]), helper.make_node("QuantizeLinear", ["c", "scale", "zero"], ["q"])
    outputs = [helper.make_tensor_value_info("q", code, ["n"])]
    if readers == 2:
        outputs.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, ["n"]))
    entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    graph = helper.make_graph([clip, quantise], "g", [entry], outputs, [*bounds, *outside])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def codes_of(content: bytes, values: dict[str, NDArray[np.generic]], x: F32) -> NDArray[np.generic]:
    return open_session(content, values, session_options(optimise=False)).run(["q"], {"x": x})[0]


def clips(content: bytes) -> int:
    return OnnxGraph(content).operators()["Clip"]


@settings(max_examples=60, deadline=None)
@given(
    low=st.sampled_from([None, 0.0, -6.0, -1.0]),
    high=st.sampled_from([None, 6.0, 1.0]),
    reach=st.floats(0.9, 1.1) | st.sampled_from([1.0, np.nextafter(1, 2), np.nextafter(1, 0)]),
    zero=st.sampled_from([0, 1, 128, 255]),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_code_changes_whatever_the_scale(low, high, reach, zero, seed) -> None:
    scale = np.float32((6.0 if high is None else high) * reach / 255)
    values = {"scale": np.asarray(scale), "zero": np.asarray(np.uint8(zero))}
    there = model(low, high)
    spread = np.random.default_rng(seed).normal(0, 6, 200).astype(np.float32)
    edges = np.float32([v + k * scale / 4 for v in (low or 0, high or 0) for k in range(-4, 5)])
    x = np.concatenate([spread, edges, np.float32([np.inf, -np.inf])])
    assert np.array_equal(codes_of(OnnxGraph(there).without_idle_clips(values), values, x), codes_of(there, values, x))


@pytest.mark.parametrize(
    ("reach", "left"),
    [(5.0, 0), (6.0, 0), (6.0095, 0), (6.0165, 1), (7.0, 1)],  # half a step at 6 is 0.0118
)
def test_a_clip_leaves_where_the_codes_end_within_half_a_step_of_it(reach, left) -> None:
    values = {"scale": np.asarray(np.float32(reach / 255)), "zero": np.asarray(np.uint8(0))}
    assert clips(OnnxGraph(model(0.0, 6.0)).without_idle_clips(values)) == left


def test_signed_codes_have_their_own_ends() -> None:
    def left(low: float, high: float) -> int:
        values = {"scale": np.asarray(np.float32(6 / 127)), "zero": np.asarray(np.int8(0))}
        return clips(OnnxGraph(model(low, high, np.int8)).without_idle_clips(values))

    assert left(-6.05, 6.0) == 0 and left(-6.0, 6.0) == 1, "the lowest code is -128"
    assert left(-6.05, 5.9) == 1


def test_a_clip_that_others_read_or_whose_scale_is_not_told_stays() -> None:
    values = {"scale": np.asarray(np.float32(5 / 255)), "zero": np.asarray(np.uint8(0))}
    assert clips(OnnxGraph(model(0.0, 6.0, readers=2)).without_idle_clips(values)) == 1
    assert clips(OnnxGraph(model(0.0, 6.0)).without_idle_clips({"scale": values["scale"]})) == 1


def test_what_is_not_touched_is_the_same_file() -> None:
    whole = onnx.load_from_string(OnnxGraph(model(0.0, 6.0)).without_idle_clips({}))
    assert whole == onnx.load_from_string(model(0.0, 6.0))


def test_a_relu6_net_starts_and_takes_scales_that_reach_a_little_beyond_its_clips(tmp_path: Path) -> None:
    made = export_nets.make("inverted")
    options = Options(("ort-x86-avx2",), "inverted", observer="minmax", min_agreement=0)
    pictures = Pictures(export_nets.pictures(24), None)
    bundle = export_model(made, tmp_path / "m.refold", export_nets.PREPROCESS, pictures, options).bundle
    factory = EngineFactory(bundle)
    wider = tuple(replace(a, scale=float(np.float32(6.0095 / 255))) for a in bundle.norms.activations if is_clipped(a))
    x = bundle.preprocess.apply(export_nets.pictures(4, seed=3))
    ours = factory.build(ServingState({}, wider)).run(x)
    content = bundle.read(bundle.target("ort-x86-avx2").model)
    try:
        fresh = open_session(content, bundle.norms.tensors({}, wider) | bundle.packed_weights(), session_options())
    except BundleError:
        assert ort.__version__ in BROKEN
    else:
        assert len(wider) > 1 and np.array_equal(ours, fresh.run(None, {"input": x})[0])


def is_clipped(a: ActivationScale) -> bool:
    return a.zero_point == 0 and abs(a.scale * 255 - 6) < 0.01
