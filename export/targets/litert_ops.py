"""Operators on int8 codes. A function leaves its result in a new tensor and returns it with the order it lies in.

TFLite's concatenation wants one scale for all: inputs of another are requantised before it, as ONNX Runtime does inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from export.ir import Node
from export.targets.litert_builder import LiteRtBuilder, Order, channels_last, plain
from export.targets.litert_moves import Side, codes_side, padded
from export.targets.litert_shapes import common_order, is_same
from export.targets.pooling import ceil_pads

__all__ = ["INTEGER", "aligned", "clamped", "clamped_codes", "conv_options", "emit_integer_layer", "emit_logits", "float_layer"]

Result = tuple[int, Order]
NONE = schema.ActivationFunctionType.NONE
FUSED = {
    (0.0, math.inf): schema.ActivationFunctionType.RELU,
    (0.0, 6.0): schema.ActivationFunctionType.RELU6,
    (-1.0, 1.0): schema.ActivationFunctionType.RELU_N1_TO_1,
}
LOGIT_CODES = 32767
# Norms may grow what the last layer sees. 16-bit logits have codes to spare: with room for 8 times what calibration saw (the
# trust region's own factor), a step is still 1/4096 of the largest logit.
LOGIT_ROOM = 8.0


def fused(node: Node) -> int:
    return int(FUSED.get(node.activation, NONE)) if node.activation is not None else int(NONE)


def clamped(b: LiteRtBuilder, node: Node, tensor: int) -> int:
    """The absorbed activation function on floats."""
    if node.activation is None:
        return tensor
    low, high = node.activation
    name, shape = f"{node.name}.clamped", b.shape(tensor)
    if low == 0 and high in (6.0, math.inf):
        return b.float_operator("RELU6" if high == 6.0 else "RELU", [tensor], name, shape)
    for op, bound in (("MAXIMUM", low), ("MINIMUM", high)):
        if math.isfinite(bound):
            tensor = b.float_operator(op, [tensor, b.number(bound)], name, shape)
    return tensor


def clamped_codes(b: LiteRtBuilder, node: Node, tensor: int) -> int:
    """The absorbed activation on codes. As exported it changes nothing, the codes' range ends there; a release may move it."""
    if node.activation is None:
        return tensor
    low, high = node.activation
    out = b.code_tensor(node.output, f"{node.name}.clamped", b.shape(tensor))
    if low == 0 and high in (6.0, math.inf):
        b.operator("RELU6" if high == 6.0 else "RELU", [tensor], out)
        return out
    real = b.float_operator("DEQUANTIZE", [tensor], f"{node.name}.open", b.shape(tensor))
    b.operator("QUANTIZE", [clamped(b, node, real)], out)
    return out


# Layers --------------------------------------------------------------------------------------------------------------------


def is_depthwise(b: LiteRtBuilder, node: Node) -> bool:
    return node.op == "conv" and node.attributes["groups"] == b.sizes[node.inputs[0]][1] > 1


def _layout(b: LiteRtBuilder, node: Node) -> tuple[tuple[int, ...], int]:
    """How the graph's weights are transposed into TFLite's, and the axis of the output channels there."""
    if node.op == "linear":
        return (0, 1), 0
    return ((1, 2, 3, 0), 3) if is_depthwise(b, node) else ((0, 2, 3, 1), 0)


def _parameters(b: LiteRtBuilder, node: Node) -> tuple[int, int]:
    """The tensors of an integer layer's weights and int32 bias."""
    names = b.model.sites[node.output].tensors
    axes, axis = _layout(b, node)
    weight = b.weights(node, axes)
    b.quantise(weight, b.values[names.weight_scale], axis=axis)
    b.carries(weight, "scale", names.weight_scale)
    value = b.values[names.bias]
    bias = b.tensor(f"{node.name}.bias", value.shape, np.int32, value)
    b.quantise(bias, b.values[names.bias_scale])
    b.carries(bias, "data", names.bias)
    b.carries(bias, "scale", names.bias_scale)
    return weight, bias


def conv_options(b: LiteRtBuilder, node: Node, x: int, side: Side, shape: tuple[int, ...]) -> tuple[int, dict[str, int]]:
    """(input, padded where SAME does not say it; options) of a convolution with output `shape`, stored NHWC."""
    a = node.attributes
    kernel = b.graph.constants[node.parameters["weight"]].shape[2:]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, a["dilations"], strict=True)]
    pads = ceil_pads(b.shape(x)[1:3], shape[1:3], {"kernel": reach, "strides": a["strides"], "pads": a["pads"]})
    padding = schema.Padding.VALID
    if any(pads) and is_same(b.shape(x)[1:3], kernel, a["strides"], a["dilations"], pads):
        padding = schema.Padding.SAME
    elif any(pads):
        x = padded(b, node, x, side, [0, *pads[:2], 0], [0, *pads[2:], 0])
    options = {
        "padding": padding, "strideH": a["strides"][0], "strideW": a["strides"][1],
        "dilationHFactor": a["dilations"][0], "dilationWFactor": a["dilations"][1],
    }  # fmt: skip
    if is_depthwise(b, node):
        options["depthMultiplier"] = shape[3] // b.shape(x)[3]
    return x, options


def layer_operator(b: LiteRtBuilder, node: Node) -> str:
    return "FULLY_CONNECTED" if node.op == "linear" else "DEPTHWISE_CONV_2D" if is_depthwise(b, node) else "CONV_2D"


def emit_integer_layer(b: LiteRtBuilder, node: Node) -> Result:
    """conv or linear, codes in and codes out."""
    order = plain(2) if node.op == "linear" else channels_last(4)
    x, shape = b.codes(node.inputs[0], order), b.stored(node.output, order)
    options: dict[str, int] = {}
    if node.op == "conv":
        x, options = conv_options(b, node, x, codes_side(b, node), shape)
    weight, bias = _parameters(b, node)
    out = b.code_tensor(node.output, node.name, shape)
    b.operator(layer_operator(b, node), [x, weight, bias], out, fusedActivationFunction=fused(node), **options)
    return out if node.activation is None or fused(node) != NONE else clamped_codes(b, node, out), order


def emit_logits(b: LiteRtBuilder, node: Node) -> Result:
    """The last linear layer: 16-bit activations around 8-bit weights, then float.

    ONNX Runtime leaves this layer's sums in float. TFLite cannot with 8-bit inputs, and 8-bit logits would clip as soon as a
    release sharpens them; its 16x8 kernel has 256 times the codes and costs 0.2 ms for 1280 x 1000.
    """
    entry = b.scales[b.model.placement.scale_of[node.inputs[0]]]
    x = b.codes(node.inputs[0], plain(2))
    wide = b.tensor(f"{node.name}.input", b.shape(x), np.int16)
    b.quantise(wide, entry.scale)
    b.carries(wide, "scale", entry.scale_tensor)
    b.operator("QUANTIZE", [x], wide)
    weight, bias = _parameters(b, node)
    out = b.tensor(node.name, b.sizes[node.output], np.int16)
    b.quantise(out, max(b.model.peak, 1e-6) * LOGIT_ROOM / LOGIT_CODES)
    b.operator("FULLY_CONNECTED", [wide, weight, bias], out, fusedActivationFunction=NONE)
    return b.float_operator("DEQUANTIZE", [out], f"{node.name}.real", b.sizes[node.output]), plain(2)


def float_layer(b: LiteRtBuilder, node: Node, side: Side) -> Result:
    """An integer layer in float, from the same integers: taps look at its output before activation and rounding."""
    names = b.model.sites[node.output].tensors
    weight, bias = _parameters(b, node)
    real = b.float_operator("DEQUANTIZE", [weight], f"{node.name}.weight.real", b.shape(weight))
    steps = b.float_operator("CAST", [bias], f"{node.name}.bias.steps", b.shape(bias),
                             inDataType=schema.TensorType.INT32, outDataType=schema.TensorType.FLOAT32)  # fmt: skip
    scale = b.tensor(f"{node.name}.bias.scale", b.shape(bias), np.float32, b.values[names.bias_scale])
    b.carries(scale, "data", names.bias_scale)
    added = b.float_operator("MUL", [steps, scale], f"{node.name}.bias.real", b.shape(bias))
    order = plain(2) if node.op == "linear" else channels_last(4)
    x, shape = side.read(order), b.stored(node.output, order)
    options: dict[str, int] = {}
    if node.op == "conv":
        x, options = conv_options(b, node, x, side, shape)
    out = b.tensor(node.name, shape)
    b.operator(layer_operator(b, node), [x, real, added], out, fusedActivationFunction=NONE, **options)
    return out, order


# Others --------------------------------------------------------------------------------------------------------------------


def aligned(b: LiteRtBuilder, node: Node, form: str) -> tuple[list[int], Order]:
    """Inputs of an elementwise operator in one order, with as many axes as its output."""
    rank = b.rank(node.output)
    order = common_order([b.order(v) for v in node.inputs], rank)
    found = []
    for value in node.inputs:
        read = b.codes if form == "codes" else b.real
        if b.rank(value) == rank:
            found.append(read(value, order))
            continue
        wide = (*[1] * (rank - b.rank(value)), *b.sizes[value])
        shape = tuple(wide[axis] for axis in order)
        x = read(value, plain(b.rank(value)))
        if order != plain(rank) and sum(s != 1 for s in shape) > 1:
            order = plain(rank)
            return [_widened(b, v, form, rank) for v in node.inputs], order
        found.append(_reshaped(b, value, form, x, shape))
    return found, order


def _widened(b: LiteRtBuilder, value: str, form: str, rank: int) -> int:
    read = b.codes if form == "codes" else b.real
    x = read(value, plain(b.rank(value)))
    shape = (*[1] * (rank - b.rank(value)), *b.sizes[value])
    return x if b.rank(value) == rank else _reshaped(b, value, form, x, shape)


def _reshaped(b: LiteRtBuilder, value: str, form: str, x: int, shape: tuple[int, ...]) -> int:
    name = f"{b.names.get(value, value)}.wide"
    out = b.code_tensor(value, name, shape) if form == "codes" else b.tensor(name, shape)
    b.operator("RESHAPE", [x, b.integers(*shape)], out, newShape=list(shape))
    return out


def _elementwise(op: str) -> Callable[[LiteRtBuilder, Node], Result]:
    def emit(b: LiteRtBuilder, node: Node) -> Result:
        xs, order = aligned(b, node, "codes")
        out = b.code_tensor(node.output, node.name, b.stored(node.output, order))
        b.operator(op, xs, out, fusedActivationFunction=fused(node))
        return out if node.activation is None or fused(node) != NONE else clamped_codes(b, node, out), order

    return emit


def _concat(b: LiteRtBuilder, node: Node) -> Result:
    order = common_order([b.order(v) for v in node.inputs], b.rank(node.output))
    parts = []
    for value in node.inputs:
        part = b.codes(value, order)
        if b.model.placement.scale_of[value] != b.model.placement.scale_of[node.output]:
            same = b.code_tensor(node.output, f"{node.name}.part", b.shape(part))
            b.requantised(part, same)
            part = same
        parts.append(part)
    out = b.code_tensor(node.output, node.name, b.stored(node.output, order))
    b.operator("CONCATENATION", parts, out, axis=order.index(node.attributes["axis"]), fusedActivationFunction=NONE)
    return clamped_codes(b, node, out), order


def _global_avg_pool(b: LiteRtBuilder, node: Node) -> Result:
    order = channels_last(4)
    out = b.code_tensor(node.output, node.name, b.stored(node.output, order))
    b.operator("MEAN", [b.codes(node.inputs[0], order), b.integers(1, 2)], out, keepDims=True)
    return clamped_codes(b, node, out), order


INTEGER: dict[str, Callable[[LiteRtBuilder, Node], Result]] = {
    "add": _elementwise("ADD"),
    "mul": _elementwise("MUL"),
    "concat": _concat,
    "global_avg_pool": _global_avg_pool,
}
