"""How each operator of the graph is written in ONNX. A function gets the builder, the node and the names of its inputs.

It returns nothing: it leaves the node's float result under `target` (or, for operators that move codes, the codes).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from export.ir import Node
from export.targets.onnx_builder import OnnxBuilder
from export.targets.pooling import ceil_pads
from refold.errors import ModelError

__all__ = ["EMITTERS", "emit_codes", "emit_integer_layer"]

Emitter = Callable[[OnnxBuilder, Node, list[str], str], None]
INT64_MAX = 2**63 - 1


def emit_integer_layer(b: OnnxBuilder, node: Node, target: str) -> None:
    """conv or linear on codes: dequantised codes in, int32 bias at scale x·w, float out; ONNX Runtime fuses all of it."""
    names, axis = b.model.sites[node.output].tensors, 0
    kernel = b.graph.constants[node.parameters["weight"]].shape[2:]
    q, zero = b.weight_codes(node)
    weight = b.node("DequantizeLinear", [q, names.weight_scale, zero], f"{node.output}.w", axis=axis)
    bias = b.node("DequantizeLinear", [names.bias, names.bias_scale], f"{node.output}.b", axis=0)
    x = b.real(node.inputs[0])
    if node.op == "linear":
        b.node("Gemm", [x, weight, bias], target, transB=1, name=node.name)
        return
    a = node.attributes
    b.node(
        "Conv", [x, weight, bias], target, name=node.name, kernel_shape=list(kernel), strides=a["strides"],
        pads=a["pads"], dilations=a["dilations"], group=a["groups"],
    )  # fmt: skip


def _conv(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    a = node.attributes
    inputs = [*xs, b.parameter(node, "weight"), *([b.parameter(node, "bias")] if "bias" in node.parameters else [])]
    shape = b.graph.constants[node.parameters["weight"]].shape
    b.node("Conv", inputs, target, name=node.name, kernel_shape=list(shape[2:]), strides=a["strides"], pads=a["pads"],
           dilations=a["dilations"], group=a["groups"])  # fmt: skip


def _conv_transpose(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    a = node.attributes
    inputs = [*xs, b.parameter(node, "weight"), *([b.parameter(node, "bias")] if "bias" in node.parameters else [])]
    b.node("ConvTranspose", inputs, target, name=node.name, strides=a["strides"], pads=a["pads"], dilations=a["dilations"],
           group=a["groups"], output_padding=a["output_padding"])  # fmt: skip


def _linear(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    inputs = [*xs, b.parameter(node, "weight"), *([b.parameter(node, "bias")] if "bias" in node.parameters else [])]
    b.node("Gemm", inputs, target, transB=1, name=node.name)


def _per_channel(b: OnnxBuilder, name: str, rank: int) -> str:
    """A (C,) initialiser shaped to multiply axis 1 of a tensor of this rank."""
    axes = list(range(1, rank - 1))
    return b.node("Unsqueeze", [name, b.integers(f"axes.{rank}", *axes)], f"{name}.{rank}d") if axes else name


def _affine(b: OnnxBuilder, node: Node, source: str, target: str, rank: int) -> None:
    """Explicit multiply and add of a BATCH or GROUP site; constants where the norm has no parameters of its own."""
    if node.output in b.model.sites:
        names = b.model.sites[node.output].tensors
        multiply, add = names.multiply, names.add
    else:
        multiply, add = b.parameter(node, "gamma"), b.parameter(node, "beta")
    scaled = b.node("Mul", [source, _per_channel(b, multiply, rank)], f"{target}.scaled")
    b.node("Add", [scaled, _per_channel(b, add, rank)], target)


def _batch_norm(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    _affine(b, node, xs[0], target, len(b.graph.shapes[node.inputs[0]]))


def _layer_norm(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    if node.output in b.model.sites:
        names = b.model.sites[node.output].tensors
        affine = [names.multiply, names.add]
    else:
        affine = [b.parameter(node, "gamma"), b.parameter(node, "beta")]
    b.node("LayerNormalization", [*xs, *affine], target, axis=-1, epsilon=node.attributes["epsilon"], name=node.name)


def _group_norm(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    shape, groups = b.graph.shapes[node.inputs[0]], node.attributes["groups"]
    rows = b.node("Reshape", [*xs, b.integers(f"groups.{groups}", 0, groups, -1)], f"{target}.groups")
    one, zero = b.constant(f"ones.{groups}", np.ones(groups)), b.constant(f"zeros.{groups}", np.zeros(groups))
    even = b.node(
        "InstanceNormalization", [rows, one, zero], f"{target}.even", epsilon=node.attributes["epsilon"], name=node.name
    )
    back = b.node("Reshape", [even, b.integers(f"{target}.shape", -1, *shape[1:])], f"{target}.normal")
    _affine(b, node, back, target, len(shape))


def _rms_norm(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    square = b.node("Mul", [xs[0], xs[0]], f"{target}.square")
    mean = b.node("ReduceMean", [square], f"{target}.mean", axes=[-1], keepdims=1)
    epsilon = b.constant(f"epsilon.{node.attributes['epsilon']:g}", node.attributes["epsilon"])
    root = b.node("Sqrt", [b.node("Add", [mean, epsilon], f"{target}.bounded")], f"{target}.root")
    even = b.node("Div", [xs[0], root], f"{target}.even", name=node.name)
    gamma = b.model.sites[node.output].tensors.multiply if node.output in b.model.sites else b.parameter(node, "gamma")
    b.node("Mul", [even, gamma], target)


def _max_pool(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    a = node.attributes
    b.node("MaxPool", xs, target, name=node.name, kernel_shape=a["kernel"], strides=a["strides"], pads=a["pads"],
           ceil_mode=int(a["ceil"]), dilations=a["dilations"])  # fmt: skip


def _avg_pool(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    """Windows that run past the edge are written as pads: ONNX Runtime's ceil_mode divides them by the wrong number."""
    a = node.attributes
    size, out = b.graph.shapes[node.inputs[0]][2:], b.graph.shapes[node.output][2:]
    pads, include = ceil_pads(size, out, a), bool(a["count_include_pad"])
    past = any(after > given for after, given in zip(pads[2:], a["pads"][2:], strict=True))
    if past and include and any(a["pads"]):
        raise ModelError(
            f"Layer {node.name} is an average pooling that counts its padding and runs past the edge (ceil_mode), which ONNX "
            "does not have. Set count_include_pad=False or ceil_mode=False.",
            code="operator",
        )
    b.node("AveragePool", xs, target, name=node.name, kernel_shape=a["kernel"], strides=a["strides"],
           pads=pads if past else a["pads"], count_include_pad=int(include and not past))  # fmt: skip


def _reshape(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    shape = node.attributes["shape"]
    b.node("Reshape", [*xs, b.integers("shape." + ".".join(map(str, shape)), *shape)], target)


def _transpose(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    b.node("Transpose", xs, target, perm=node.attributes["axes"])


def _slice(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    a = node.attributes
    given = [b.integers(f"int.{a[k]}", a[k]) for k in ("start", "stop", "axis", "step")]
    b.node("Slice", [*xs, *given], target)


def _pad(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    widths = [*node.attributes["before"], *node.attributes["after"]]
    b.node("Pad", [xs[0], b.integers(f"{target}.pads", *widths), *xs[1:]], target, mode="constant")


def _upsample_nearest(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    scales = b.constant(f"{target}.factors", [1, 1, *node.attributes["scales"]])
    b.node("Resize", [xs[0], "", scales], target, mode="nearest", nearest_mode="floor",
           coordinate_transformation_mode="asymmetric")  # fmt: skip


def _upsample_bilinear(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    before, after = b.graph.shapes[node.inputs[0]], node.attributes["size"]
    scales = b.constant(f"{target}.factors", [1, 1, after[0] / before[2], after[1] / before[3]])
    mode = "align_corners" if node.attributes["align_corners"] else "half_pixel"
    b.node("Resize", [xs[0], "", scales], target, mode="linear", coordinate_transformation_mode=mode)


def _clamp(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    b.clamped(node.with_attributes(activation=(node.attributes["low"], node.attributes["high"])), xs[0], target)


def _reduce(op: str) -> Emitter:
    def emit(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
        axes, keep = node.attributes["axes"], int(node.attributes["keep"])
        if op == "ReduceSum":
            b.node(op, [*xs, b.integers("axes.of." + ".".join(map(str, axes)), *axes)], target, keepdims=keep)
        else:
            b.node(op, xs, target, axes=axes, keepdims=keep)

    return emit


def _simple(op: str, **attributes: object) -> Emitter:
    def emit(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
        renamed = {k: node.attributes[v] for k, v in attributes.items() if isinstance(v, str)}
        b.node(op, xs, target, **{k: v for k, v in attributes.items() if not isinstance(v, str)}, **renamed)

    return emit


def _with_constant(op: str) -> Emitter:
    def emit(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
        value = b.parameter(node, "value")
        b.node(op, [value, *xs] if node.attributes.get("reversed") else [*xs, value], target)

    return emit


def _gelu(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    x, half, one = xs[0], b.constant("half", 0.5), b.constant("one", 1.0)
    inner = b.node("Div", [x, b.constant("root2", math.sqrt(2))], f"{target}.inner")
    bell = b.node("Add", [b.node("Erf", [inner], f"{target}.erf"), one], f"{target}.bell")
    b.node("Mul", [b.node("Mul", [x, bell], f"{target}.both"), half], target)


def _gelu_tanh(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    x, half, one = xs[0], b.constant("half", 0.5), b.constant("one", 1.0)
    cube = b.node("Mul", [b.node("Mul", [x, x], f"{target}.square"), x], f"{target}.cube")
    small = b.node("Mul", [cube, b.constant("gelu.cubic", 0.044715)], f"{target}.small")
    inner = b.node("Mul", [b.node("Add", [x, small], f"{target}.sum"), b.constant("gelu.root", math.sqrt(2 / math.pi))],
                   f"{target}.inner")  # fmt: skip
    bell = b.node("Add", [b.node("Tanh", [inner], f"{target}.tanh"), one], f"{target}.bell")
    b.node("Mul", [b.node("Mul", [x, bell], f"{target}.both"), half], target)


def _gated(op: str) -> Emitter:
    """x times a function of x: SiLU, Mish."""

    def emit(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
        gate = b.node("Softplus" if op == "Tanh" else op, xs, f"{target}.gate")
        gate = b.node("Tanh", [gate], f"{target}.gate.tanh") if op == "Tanh" else gate
        b.node("Mul", [*xs, gate], target)

    return emit


def _rsqrt(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    b.node("Reciprocal", [b.node("Sqrt", xs, f"{target}.root")], target)


def _prelu(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    slope, rank = b.parameter(node, "slope"), len(b.graph.shapes[node.inputs[0]])
    b.node("PRelu", [*xs, _per_channel(b, slope, rank) if rank > 2 else slope], target)


def _expand_constant(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    value = b.parameter(node, "value")
    rank = len(b.graph.shapes[node.output])
    size = b.node("Shape", [b.graph.input], "batch.shape")
    zero = b.integers("int.0", 0)
    batch = b.node("Gather", [size, zero], "batch.size", axis=0)
    shape = b.node("Concat", [batch, b.integers(f"ones.int.{rank - 1}", *[1] * (rank - 1))], f"{target}.shape", axis=0)
    b.node("Expand", [value, shape], target)


EMITTERS: dict[str, Emitter] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "rms_norm": _rms_norm,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "global_avg_pool": _simple("GlobalAveragePool"),
    "reshape": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "pad": _pad,
    "upsample_nearest": _upsample_nearest,
    "upsample_bilinear": _upsample_bilinear,
    "clamp": _clamp,
    "concat": _simple("Concat", axis="axis"),
    "softmax": _simple("Softmax", axis="axis"),
    "log_softmax": _simple("LogSoftmax", axis="axis"),
    "matmul": _simple("MatMul"),
    "matmul_constant": _with_constant("MatMul"),
    "mean": _reduce("ReduceMean"),
    "sum": _reduce("ReduceSum"),
    "amax": _reduce("ReduceMax"),
    "leaky_relu": _simple("LeakyRelu", alpha="slope"),
    "elu": _simple("Elu", alpha="alpha"),
    "prelu": _prelu,
    "sigmoid": _simple("Sigmoid"),
    "tanh": _simple("Tanh"),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _gated("Sigmoid"),
    "mish": _gated("Tanh"),
    "hardswish": _simple("HardSwish"),
    "hardsigmoid": _simple("HardSigmoid", alpha=1 / 6, beta=0.5),
    "softplus": _simple("Softplus"),
    "exp": _simple("Exp"),
    "log": _simple("Log"),
    "sqrt": _simple("Sqrt"),
    "rsqrt": _rsqrt,
    "reciprocal": _simple("Reciprocal"),
    "neg": _simple("Neg"),
    "abs": _simple("Abs"),
    "erf": _simple("Erf"),
    "expand_constant": _expand_constant,
    **{f"{name}_constant": _with_constant(op) for name, op in (
        ("add", "Add"), ("sub", "Sub"), ("mul", "Mul"), ("div", "Div"), ("pow", "Pow"), ("maximum", "Max"), ("minimum", "Min"),
    )},
    "add": _simple("Add"),
    "sub": _simple("Sub"),
    "mul": _simple("Mul"),
    "div": _simple("Div"),
    "pow": _simple("Pow"),
    "maximum": _simple("Max"),
    "minimum": _simple("Min"),
}  # fmt: skip


def emit_codes(b: OnnxBuilder, node: Node) -> None:
    """Operators that move codes: on the uint8 tensor itself. Zeros that are padded in are the zero point."""
    source = b.codes(node.inputs[0])
    zero_point = b.scale(node.inputs[0])[1]
    if node.op == "clamp":
        b.node("Max", [source, zero_point], f"{node.output}.q")
        return
    EMITTERS[node.op](b, node, [source, zero_point] if node.op == "pad" else [source], f"{node.output}.q")
