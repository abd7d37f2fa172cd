"""A residual QDQ network written by hand, as the contract says export writes it: for tests that may not import torch.

conv-bn-relu, then `blocks` of (conv-bn-relu, conv-bn, add, relu), pooling and a linear layer. The statistics of every norm are
those of the calibration images, so that the net is alive; the weights are random.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from refold import ActivationScale, Bundle, NormSite, NormState, NormTable, Preprocess, SigningKey, write_bundle
from refold.codec import table_to_pb
from refold.norms import SiteTensors
from refold.v1 import manifest_pb2 as pb

TARGET = "ort-x86-avx2"
Array = NDArray[np.float64]


def images(count: int, size: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth random pictures: uint8 (count, size, size, 3)."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (count, 4, 4, 3))
    steps = np.linspace(0, 3, size)
    low = np.floor(steps).astype(int).clip(0, 2)
    part = (steps - low)[None, :, None, None]
    rows = coarse[:, low] * (1 - part) + coarse[:, low + 1] * part
    part = (steps - low)[None, None, :, None]
    full = rows[:, :, low] * (1 - part) + rows[:, :, low + 1] * part
    return np.clip(full + rng.normal(0, 12, full.shape), 0, 255).astype(np.uint8)


def _conv(x: Array, w: Array, stride: int) -> Array:
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows[:, :, ::stride, ::stride], w, optimize=True)


@dataclass
class _Writer:
    """Collects nodes, initialisers, sites and activation scales while the net runs on the calibration images."""

    rng: np.random.Generator
    size: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    sites: list[NormSite] = field(default_factory=list)
    scales: dict[str, ActivationScale] = field(default_factory=dict)
    taps: list[str] = field(default_factory=list)

    def node(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def inline(self, name: str, values: NDArray[np.generic]) -> str:
        self.tensors.append(onnx.numpy_helper.from_array(values, name))
        return name

    def external(self, name: str, shape: tuple[int, ...], kind: int) -> str:
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="adaptable")
        self.tensors.append(tensor)
        return name

    def activation(self, source: str, values: Array, signed: bool) -> str:
        """Q and DQ behind `source`; the scale covers the calibration values."""
        low, high = (min(0.0, float(values.min())), float(values.max())) if signed else (0.0, float(values.max()))
        scale = float(np.float32(max(high - low, 1e-3) / 255))
        zero = round(-low / scale)
        s, z = f"{source}.scale", f"{source}.zero_point"
        self.scales[source] = ActivationScale(source, scale, zero, s, z)
        self.external(s, (), TensorProto.FLOAT)
        self.external(z, (), TensorProto.UINT8)
        self.node("QuantizeLinear", [source, s, z], f"{source}.q")
        return self.node("DequantizeLinear", [f"{source}.q", s, z], f"{source}.dq")

    def integer(self, name: str, w: Array, exported: NormState, source: str, has_norm: bool) -> tuple[str, str, Array]:
        """One layer's integers and its site; returns the names of dequantised weight and bias, and the engine's weight."""
        out = w.shape[0]
        flat = np.abs(w.reshape(out, -1)).max(1)
        weight_scale = (flat / 64).astype(np.float32)
        names = SiteTensors(f"{name}.ws", f"{name}.b", f"{name}.bs")
        site = NormSite.folded(
            name,
            weight_scale=weight_scale,
            layer_bias=np.zeros(out),
            exported=exported,
            input_tensor=source,
            input_scale=self.scales[source].scale,
            epsilon=1e-5,
            has_norm=has_norm,
            tensors=names,
        )
        self.sites.append(site)
        shape = (out,) + (1,) * (w.ndim - 1)
        codes = np.rint(w / weight_scale.reshape(shape))
        signed = (codes * site.sign.reshape(shape)).astype(np.int8)
        self.inline(f"{name}.q", signed)
        self.inline(f"{name}.wz", np.zeros(out, np.int8))
        self.external(names.weight_scale, (out,), TensorProto.FLOAT)
        self.external(names.bias, (out,), TensorProto.INT32)
        self.external(names.bias_scale, (out,), TensorProto.FLOAT)
        weight = self.node("DequantizeLinear", [f"{name}.q", names.weight_scale, f"{name}.wz"], f"{name}.w", axis=0)
        bias = self.node("DequantizeLinear", [names.bias, names.bias_scale], f"{name}.bias", axis=0)
        return weight, bias, codes * weight_scale.reshape(shape)

    def conv(self, name: str, x: Array, source: str, out: int, stride: int) -> tuple[str, Array]:
        """conv + norm; returns the output tensor's name and its calibration values."""
        w = self.rng.normal(0, 1 / np.sqrt(9 * x.shape[1]), (out, x.shape[1], 3, 3))
        y = _conv(x, w, stride)
        state = NormState(
            self.rng.uniform(0.5, 1.5, out) * self.rng.choice([1, 1, 1, -1], out),
            self.rng.normal(0, 0.3, out),
            y.mean((0, 2, 3)),
            y.var((0, 2, 3)) + 1e-4,
        )
        weight, bias, w = self.integer(name, w, state, source, True)
        y = _conv(x, w, stride)
        a = (state.gamma / np.sqrt(state.variance + 1e-5)).reshape(1, -1, 1, 1)
        y = (y - state.mean.reshape(1, -1, 1, 1)) * a + state.beta.reshape(1, -1, 1, 1)
        self.node("Conv", [f"{source}.dq", weight, bias], f"{name}.y", kernel_shape=[3, 3], pads=[1] * 4, strides=[stride] * 2)
        self.taps.append(f"{name}.y")
        return f"{name}.y", y


def residual_net(
    *, size: int = 16, widths: tuple[int, ...] = (8, 16), blocks: int = 1, classes: int = 5, seed: int = 0, inputs: int = 64
) -> tuple[bytes, bytes, NormTable, NDArray[np.uint8], Preprocess]:
    """(model.onnx, taps.onnx, norm table, calibration images, preprocessing)."""
    preprocess = Preprocess(size, size, 1 / 255, (0.5, 0.45, 0.4), (0.25, 0.25, 0.3))
    pictures = images(inputs, size, seed)
    w = _Writer(np.random.default_rng(seed), size)
    x = preprocess.apply(pictures).astype(np.float64)
    w.activation("input", x, True)
    name, x = w.conv("stem", x, "input", widths[0], 1)
    x = np.maximum(x, 0)
    source = w.node("Relu", [name], "stem.r")
    w.activation(source, x, False)
    for stage, width in enumerate(widths):
        for block in range(blocks):
            here = f"s{stage}.{block}"
            stride = 2 if stage and not block else 1
            name, y = w.conv(f"{here}.a", x, source, width, stride)
            y = np.maximum(y, 0)
            inner = w.node("Relu", [name], f"{here}.a.r")
            w.activation(inner, y, False)
            name, y = w.conv(f"{here}.b", y, inner, width, 1)
            w.activation(name, y, True)
            if x.shape[1:] == y.shape[1:]:
                y = y + x
                name = w.node("Add", [f"{name}.dq", f"{source}.dq"], f"{here}.sum")
                w.activation(name, y, True)
            y = np.maximum(y, 0)
            source = w.node("Relu", [f"{name}.dq"], f"{here}.r")
            w.activation(source, y, False)
            x = y
    w.node("GlobalAveragePool", [f"{source}.dq"], "pool")
    x = x.mean((2, 3))
    w.activation("pool", x, False)
    w.node("Flatten", ["pool.dq"], "flat")
    matrix = w.rng.normal(0, 2.5 / np.sqrt(x.shape[1]), (classes, x.shape[1]))
    matrix -= matrix.mean(1, keepdims=True)
    one = NormState(np.ones(classes), np.zeros(classes), np.zeros(classes), np.full(classes, 1 - 1e-5))
    weight, bias, matrix = w.integer("fc", matrix, one, "pool", False)
    w.node("Gemm", ["flat", weight, bias], "fc.y", transB=1)
    w.activation("fc.y", x @ matrix.T, True)
    w.nodes[-1].output[0] = "logits"
    sites = tuple(w.sites)
    table = NormTable(sites, tuple(w.scales.values()))
    answer = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])
    model = _model(w, answer)
    channels = sum(s.channels for s in table.norms)
    for i, tap in enumerate(w.taps):
        w.node("Mul", [tap, tap], f"tap{i}.square")
        for kind, value in (("mean", tap), ("square", f"tap{i}.square")):
            w.node("GlobalAveragePool", [value], f"tap{i}.{kind}.p")
            w.node("Flatten", [f"tap{i}.{kind}.p"], f"tap{i}.{kind}.f")
    w.inline("axis1", np.asarray([1]))
    for kind in ("mean", "square"):
        w.node("Concat", [f"tap{i}.{kind}.f" for i in range(len(w.taps))], f"all.{kind}", axis=1)
        w.node("Unsqueeze", [f"all.{kind}", "axis1"], f"row.{kind}")
    w.node("Concat", ["row.mean", "row.square"], "moments", axis=1)
    taps = _model(w, helper.make_tensor_value_info("moments", TensorProto.FLOAT, ["batch", 2, channels]))
    return model, taps, table, pictures, preprocess


def _model(w: _Writer, output: onnx.ValueInfoProto) -> bytes:
    entry = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, w.size, w.size])
    graph = helper.make_graph(w.nodes, "residual", [entry], [output], w.tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def residual_bundle(path: Path, *keys: SigningKey, **shape: object) -> Bundle:
    """Writes the net as a bundle; `shape` goes to `residual_net`. Its student is a stand-in: nothing on a device reads it."""
    model, taps, table, pictures, preprocess = residual_net(**shape)  # type: ignore[arg-type]
    classes = table.sites[-1].channels
    m = pb.Manifest(name="residual", made_by="tests", input_name="input", output_name="logits", class_count=classes)
    m.classes.extend(f"class {i}" for i in range(classes))
    m.student, m.calibration = "student.pt2", "calibration.npz"
    m.preprocess.CopyFrom(preprocess.to_pb())
    m.norms.CopyFrom(table_to_pb(table))
    target = m.targets.add(name=TARGET, model=f"targets/{TARGET}/model.onnx", taps=f"targets/{TARGET}/taps.onnx", weight_bits=7)
    target.updatable = True
    for site in table.sites:
        runs_in = "int8" if site.has_norm else "float: a linear layer"
        m.layers.add(name=site.name, op="Conv" if site.has_norm else "Gemm", weight_bits=7, site=site.name, runs_in=runs_in)
    calibration = io.BytesIO()
    np.savez_compressed(calibration, images=pictures)
    parts = {target.model: model, target.taps: taps, m.student: b"no student", m.calibration: calibration.getvalue()}
    return write_bundle(path, m, parts, *keys)


def shifted(table: NormTable, seed: int, strength: float = 0.2) -> dict[str, NormState]:
    """Admissible states near the exported ones."""
    rng = np.random.default_rng(seed)
    out = {}
    for site in table.norms:
        s = site.exported
        n = s.gamma.shape
        out[site.name] = NormState(
            s.gamma * rng.uniform(1 - strength, 1 + strength, n),
            s.beta + rng.normal(0, strength, n),
            s.mean + rng.normal(0, strength, n) * np.sqrt(s.variance),
            s.variance * rng.uniform(1 - strength, 1 + strength, n),
        )
    table.check(out)
    return out
