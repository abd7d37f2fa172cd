"""Operators that run in float32 between DEQUANTIZE and QUANTIZE: TFLite's own where it has one, else put together of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from export.ir import Node
from export.targets.litert_builder import LiteRtBuilder, Order, channels_last, plain
from export.targets.litert_moves import float_side, padded
from export.targets.litert_ops import Result, aligned, conv_options, layer_operator
from export.targets.litert_shapes import common_order, without_axes
from export.targets.pooling import ceil_pads
from refold.errors import ModelError

__all__ = ["FLOAT"]

Emitter = Callable[[LiteRtBuilder, Node], Result]
# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: |error| below 1.5e-7, what float32 holds
ERF_P, ERF_A = 0.3275911, (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


class _Chain:
    """Writes a formula, one operator after the other, on tensors of one shape."""

    def __init__(self, b: LiteRtBuilder, node: Node, shape: Sequence[int]) -> None:
        self.b, self.name, self.shape = b, node.name, tuple(shape)

    def __call__(self, op: str, *inputs: int | float, shape: Sequence[int] | None = None, **options: Any) -> int:
        given = [i if isinstance(i, int) else self.b.number(i) for i in inputs]
        return self.b.float_operator(op, given, self.name, shape or self.shape, **options)


def _elementwise(formula: Callable[[_Chain, int, Node], int]) -> Emitter:
    def emit(b: LiteRtBuilder, node: Node) -> Result:
        x, order = b.real(node.inputs[0]), b.order(node.inputs[0])
        return formula(_Chain(b, node, b.shape(x)), x, node), order

    return emit


def _simple(op: str, **options: Any) -> Emitter:
    return _elementwise(lambda do, x, node: do(op, x, **options))


def _softplus(do: _Chain, x: int) -> int:
    """max(x, 0) + log(1 + exp(-|x|)): does not overflow."""
    bell = do("EXP", do("NEG", do("ABS", x)))
    return do("ADD", do("RELU", x), do("LOG", do("ADD", bell, 1.0)))


def _erf(do: _Chain, x: int, node: Node) -> int:
    size = do("ABS", x)
    t = do("DIV", 1.0, do("ADD", do("MUL", size, ERF_P), 1.0))
    poly = do("MUL", t, ERF_A[4])
    for a in ERF_A[3::-1]:
        poly = do("MUL", do("ADD", poly, a), t)
    tail = do("MUL", poly, do("EXP", do("NEG", do("MUL", x, x))))
    return do("MUL", do("SIGN", x), do("SUB", 1.0, tail))


def _elu(do: _Chain, x: int, node: Node) -> int:
    alpha = float(node.attributes["alpha"])
    if alpha == 1:
        return do("ELU", x)
    positive = do("RELU", x)
    return do("ADD", positive, do("MUL", do("ELU", do("SUB", x, positive)), alpha))


def _clamp(do: _Chain, x: int, node: Node) -> int:
    low, high = node.attributes["low"], node.attributes["high"]
    if low == 0 and math.isinf(high):
        return do("RELU", x)
    for op, bound in (("MAXIMUM", low), ("MINIMUM", high)):
        x = do(op, x, float(bound)) if math.isfinite(bound) else x
    return x


def _leaky_relu(do: _Chain, x: int, node: Node) -> int:
    return do("LEAKY_RELU", x, alpha=node.attributes["slope"])


def _prelu(b: LiteRtBuilder, node: Node) -> Result:
    order = channels_last(b.rank(node.output))
    slope = b.constant(node.parameters["slope"], b.graph.constants[node.parameters["slope"]])
    x = b.real(node.inputs[0], order)
    if b.shape(slope) != (b.shape(x)[-1],):
        raise ModelError(f"Layer {node.name} is a PReLU over something else than channels.", code="operator")
    # PRELU wants as many axes as its input has, less the batch's
    alpha = b.constant(f"{node.name}.slope", b.graph.constants[node.parameters["slope"]].reshape(*[1] * (len(order) - 2), -1))
    return b.float_operator("PRELU", [x, alpha], node.name, b.shape(x)), order


def _binary(op: str) -> Emitter:
    def emit(b: LiteRtBuilder, node: Node) -> Result:
        xs, order = aligned(b, node, "real")
        return b.float_operator(op, xs, node.name, b.stored(node.output, order)), order

    return emit


def _placed(b: LiteRtBuilder, name: str, rank: int, order: Order) -> int:
    """A constant with as many axes as `order`, laid out in it."""
    value = b.graph.constants[name]
    value = value.reshape(*[1] * (rank - value.ndim), *value.shape)
    turned = "" if order == plain(rank) else ".".join(map(str, ("", *order)))
    return b.constant(name + turned, value.transpose(order))


def _with_constant(op: str) -> Emitter:
    def emit(b: LiteRtBuilder, node: Node) -> Result:
        rank = b.rank(node.output)
        if b.rank(node.inputs[0]) != rank:
            raise ModelError(f"Layer {node.name} broadcasts to more axes by a constant: LiteRT cannot follow.", code="operator")
        order = b.order(node.inputs[0])
        x, c = b.real(node.inputs[0]), _placed(b, node.parameters["value"], rank, order)
        xs = [c, x] if node.attributes.get("reversed") else [x, c]
        return b.float_operator(op, xs, node.name, b.stored(node.output, order)), order

    return emit


def _pow_constant(b: LiteRtBuilder, node: Node) -> Result:
    value = b.graph.constants[node.parameters["value"]]
    if not node.attributes.get("reversed") and value.size == 1 and float(value.item()) in (2.0, 0.5):
        squared = float(value.item()) == 2.0
        return _elementwise(lambda do, x, n: do("MUL", x, x) if squared else do("SQRT", x))(b, node)
    return _with_constant("POW")(b, node)


# Norms ---------------------------------------------------------------------------------------------------------------------


def _vectors(b: LiteRtBuilder, node: Node) -> list[int]:
    """Multiply and add of a site, or the constants of a norm that has no parameters of its own."""
    if node.output not in b.model.sites:
        return [b.constant(n, b.graph.constants[n]) for n in (node.parameters.get(r) for r in ("gamma", "beta")) if n]
    names = b.model.sites[node.output].tensors
    return [b.adaptable(n) for n in (names.multiply, names.add) if n]


def _affine(do: _Chain, x: int, vectors: list[int]) -> int:
    for op, vector in zip(("MUL", "ADD"), vectors, strict=False):
        x = do(op, x, vector)
    return x


def _batch_norm(b: LiteRtBuilder, node: Node) -> Result:
    order = channels_last(b.rank(node.output))
    x = b.real(node.inputs[0], order)
    return _affine(_Chain(b, node, b.shape(x)), x, _vectors(b, node)), order


def _normal(do: _Chain, x: int, axes: int, small: Sequence[int], epsilon: float) -> int:
    """(x - mean) / sqrt(variance + epsilon) over some stored axes."""
    mean = do("MEAN", x, axes, shape=small, keepDims=True)
    variance = do("MEAN", do("SQUARED_DIFFERENCE", x, mean), axes, shape=small, keepDims=True)
    root = do("RSQRT", do("ADD", variance, float(epsilon), shape=small), shape=small)
    return do("MUL", do("SUB", x, mean), root)


def _last_axis(b: LiteRtBuilder, value: str, axis: int) -> Order:
    """An order in which `axis` comes last: the value's own, if it is one."""
    rank, order = b.rank(value), b.order(value)
    return order if order[-1] == axis else (*(i for i in range(rank) if i != axis), axis)


def _layer_norm(b: LiteRtBuilder, node: Node) -> Result:
    order = _last_axis(b, node.inputs[0], b.rank(node.output) - 1)
    x = b.real(node.inputs[0], order)
    shape = b.shape(x)
    if b.graph.constants[node.parameters["gamma"]].shape != shape[-1:]:
        raise ModelError(f"Layer {node.name} normalises over more than the last axis: LiteRT cannot follow.", code="operator")
    do = _Chain(b, node, shape)
    even = _normal(do, x, b.integers(len(shape) - 1), (*shape[:-1], 1), node.attributes["epsilon"])
    return _affine(do, even, _vectors(b, node)), order


def _rms_norm(b: LiteRtBuilder, node: Node) -> Result:
    order = _last_axis(b, node.inputs[0], b.rank(node.output) - 1)
    x = b.real(node.inputs[0], order)
    shape, small = b.shape(x), (*b.shape(x)[:-1], 1)
    do = _Chain(b, node, shape)
    square = do("MEAN", do("MUL", x, x), b.integers(len(shape) - 1), shape=small, keepDims=True)
    root = do("RSQRT", do("ADD", square, float(node.attributes["epsilon"]), shape=small), shape=small)
    return _affine(do, do("MUL", x, root), _vectors(b, node)), order


def _group_norm(b: LiteRtBuilder, node: Node) -> Result:
    order, groups = channels_last(b.rank(node.output)), node.attributes["groups"]
    x = b.real(node.inputs[0], order)
    shape = b.shape(x)
    parts = (1, math.prod(shape[1:-1]), groups, shape[-1] // groups)
    do = _Chain(b, node, parts)
    rows = do("RESHAPE", x, b.integers(*parts), newShape=list(parts))
    even = _normal(do, rows, b.integers(1, 3), (1, 1, groups, 1), node.attributes["epsilon"])
    do = _Chain(b, node, shape)
    return _affine(do, do("RESHAPE", even, b.integers(*shape), newShape=list(shape)), _vectors(b, node)), order


# Sums and products ---------------------------------------------------------------------------------------------------------


def _softmax(op: str, **options: Any) -> Emitter:
    def emit(b: LiteRtBuilder, node: Node) -> Result:
        order = _last_axis(b, node.inputs[0], node.attributes["axis"] % b.rank(node.output))
        x = b.real(node.inputs[0], order)
        return b.float_operator(op, [x], node.name, b.shape(x), **options), order

    return emit


def _reduce(op: str) -> Emitter:
    def emit(b: LiteRtBuilder, node: Node) -> Result:
        order, rank = b.order(node.inputs[0]), b.rank(node.inputs[0])
        axes = [axis % rank for axis in node.attributes["axes"]]
        keep = bool(node.attributes["keep"])
        left = order if keep else without_axes(order, axes)
        inputs = [b.real(node.inputs[0]), b.integers(*sorted(order.index(axis) for axis in axes))]
        return b.float_operator(op, inputs, node.name, b.stored(node.output, left), keepDims=keep), left

    return emit


def _matmul(b: LiteRtBuilder, node: Node) -> Result:
    rank = b.rank(node.output)
    if any(b.rank(v) != rank for v in node.inputs):
        raise ModelError(f"Layer {node.name} multiplies matrices of different ranks: LiteRT cannot follow.", code="operator")
    turned = (*range(rank - 2), rank - 1, rank - 2)
    adjoint = b.order(node.inputs[1]) == turned
    xs = [b.real(node.inputs[0], plain(rank)), b.real(node.inputs[1], turned if adjoint else plain(rank))]
    return b.float_operator("BATCH_MATMUL", xs, node.name, b.sizes[node.output], adjX=False, adjY=adjoint), plain(rank)


def _matmul_constant(b: LiteRtBuilder, node: Node) -> Result:
    rank = b.rank(node.output)
    if b.rank(node.inputs[0]) != rank:
        raise ModelError(f"Layer {node.name} multiplies matrices of different ranks: LiteRT cannot follow.", code="operator")
    x, c = b.real(node.inputs[0], plain(rank)), _placed(b, node.parameters["value"], rank, plain(rank))
    xs = [c, x] if node.attributes.get("reversed") else [x, c]
    return b.float_operator("BATCH_MATMUL", xs, node.name, b.sizes[node.output], adjX=False, adjY=False), plain(rank)


# Layers kept in float ------------------------------------------------------------------------------------------------------


def _bias(b: LiteRtBuilder, node: Node, channels: int) -> int:
    if "bias" in node.parameters:
        return b.constant(node.parameters["bias"], b.graph.constants[node.parameters["bias"]])
    return b.constant(f"zeros.{channels}", np.zeros(channels))


def _layer(b: LiteRtBuilder, node: Node) -> Result:
    order = plain(2) if node.op == "linear" else channels_last(4)
    x, shape = b.real(node.inputs[0], order), b.stored(node.output, order)
    options: dict[str, int] = {}
    array, op = b.graph.constants[node.parameters["weight"]], layer_operator(b, node)
    if node.op == "conv":
        x, options = conv_options(b, node, x, float_side(b, node), shape)
        array = array.transpose(1, 2, 3, 0) if op == "DEPTHWISE_CONV_2D" else array.transpose(0, 2, 3, 1)
    inputs = [x, b.constant(f"{node.name}.weight", array), _bias(b, node, shape[-1])]
    return b.float_operator(op, inputs, node.name, shape, **options), order


def _conv_transpose(b: LiteRtBuilder, node: Node) -> Result:
    """The whole product by TRANSPOSE_CONV; torch's pads are then cut off, its output padding put on."""
    a, order = node.attributes, channels_last(4)
    if a["groups"] != 1 or any(d != 1 for d in a["dilations"]):
        raise ModelError(f"Layer {node.name} is a grouped or dilated transposed convolution: LiteRT has none.", code="operator")
    array, x = b.graph.constants[node.parameters["weight"]], b.real(node.inputs[0], order)
    shape, do = b.stored(node.output, order), _Chain(b, node, b.stored(node.output, order))
    whole = tuple((b.shape(x)[i + 1] - 1) * a["strides"][i] + array.shape[i + 2] for i in range(2))
    full = (1, *whole, shape[3])
    weight = b.constant(f"{node.name}.weight", array.transpose(1, 2, 3, 0))
    y = do("TRANSPOSE_CONV", b.integers(*full), weight, x, shape=full, padding=schema.Padding.VALID,
           strideH=a["strides"][0], strideW=a["strides"][1])  # fmt: skip
    begin = list(a["pads"][:2])
    end = [min(begin[i] + shape[i + 1], whole[i]) for i in range(2)]
    if [0, 0, *whole] != [*begin, *end]:
        cut = (1, end[0] - begin[0], end[1] - begin[1], shape[3])
        y = do("STRIDED_SLICE", y, b.integers(0, *begin, 0), b.integers(1, *end, shape[3]), b.integers(1, 1, 1, 1), shape=cut)
    missing = [begin[i] + shape[i + 1] - end[i] for i in range(2)]
    if any(missing):
        widths = np.array([[0, 0], [0, missing[0]], [0, missing[1]], [0, 0]])
        y = do("PAD", y, b.constant(f"{node.name}.pads", widths, np.int32))
    return do("ADD", y, _bias(b, node, shape[3])), order


def _avg_pool(b: LiteRtBuilder, node: Node) -> Result:
    """Zeros are put around the input, and TFLite divides by the whole window; where torch divides by less, a factor says so."""
    a, order, side = node.attributes, channels_last(4), float_side(b, node)
    size, out = b.sizes[node.inputs[0]][2:], b.sizes[node.output][2:]
    x, shape, pads = side.read(order), b.stored(node.output, order), ceil_pads(size, out, a)
    if any(pads):
        x = padded(b, node, x, side, [0, *pads[:2], 0], [0, *pads[2:], 0])
    y = b.float_operator(
        "AVERAGE_POOL_2D", [x], node.name, shape, padding=schema.Padding.VALID, strideH=a["strides"][0],
        strideW=a["strides"][1], filterHeight=a["kernel"][0], filterWidth=a["kernel"][1],
    )  # fmt: skip
    counts = []
    for i in range(2):
        start = np.arange(out[i]) * a["strides"][i] - a["pads"][i]
        low, high = (-a["pads"][i], size[i] + a["pads"][i + 2]) if a["count_include_pad"] else (0, size[i])
        counts.append(np.minimum(start + a["kernel"][i], high) - np.maximum(start, low))
    factor = math.prod(a["kernel"]) / np.outer(*counts)
    if (factor != 1).any():
        y = b.float_operator("MUL", [y, b.constant(f"{node.name}.factor", factor[None, :, :, None])], node.name, shape)
    return y, order


def _global_avg_pool(b: LiteRtBuilder, node: Node) -> Result:
    order = channels_last(4)
    inputs = [b.real(node.inputs[0], order), b.integers(1, 2)]
    return b.float_operator("MEAN", inputs, node.name, b.stored(node.output, order), keepDims=True), order


def _concat(b: LiteRtBuilder, node: Node) -> Result:
    order = common_order([b.order(v) for v in node.inputs], b.rank(node.output))
    parts = [b.real(v, order) for v in node.inputs]
    axis = order.index(node.attributes["axis"])
    return b.float_operator("CONCATENATION", parts, node.name, b.stored(node.output, order), axis=axis), order


def _upsample_bilinear(b: LiteRtBuilder, node: Node) -> Result:
    order, corners = channels_last(4), bool(node.attributes["align_corners"])
    shape = b.stored(node.output, order)
    inputs = [b.real(node.inputs[0], order), b.integers(*shape[1:3])]
    return b.float_operator(
        "RESIZE_BILINEAR", inputs, node.name, shape, alignCorners=corners, halfPixelCenters=not corners
    ), order


def _expand_constant(b: LiteRtBuilder, node: Node) -> Result:
    name = node.parameters["value"]
    shape = b.sizes[node.output]
    return b.constant(name, np.broadcast_to(b.graph.constants[name], shape)), plain(len(shape))


FLOAT: dict[str, Emitter] = {
    "conv": _layer,
    "linear": _layer,
    "conv_transpose": _conv_transpose,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "rms_norm": _rms_norm,
    "avg_pool": _avg_pool,
    "global_avg_pool": _global_avg_pool,
    "concat": _concat,
    "upsample_bilinear": _upsample_bilinear,
    "expand_constant": _expand_constant,
    "matmul": _matmul,
    "matmul_constant": _matmul_constant,
    "softmax": _softmax("SOFTMAX", beta=1.0),
    "log_softmax": _softmax("LOG_SOFTMAX"),
    "mean": _reduce("MEAN"),
    "sum": _reduce("SUM"),
    "amax": _reduce("REDUCE_MAX"),
    "prelu": _prelu,
    "clamp": _elementwise(_clamp),
    "leaky_relu": _elementwise(_leaky_relu),
    "elu": _elementwise(_elu),
    "erf": _elementwise(_erf),
    "sigmoid": _simple("LOGISTIC"),
    "tanh": _simple("TANH"),
    "gelu": _simple("GELU", approximate=False),
    "gelu_tanh": _simple("GELU", approximate=True),
    "silu": _elementwise(lambda do, x, node: do("MUL", x, do("LOGISTIC", x))),
    "mish": _elementwise(lambda do, x, node: do("MUL", x, do("TANH", _softplus(do, x)))),
    "softplus": _elementwise(lambda do, x, node: _softplus(do, x)),
    "hardswish": _simple("HARD_SWISH"),
    "hardsigmoid": _elementwise(lambda do, x, node: do("MUL", do("RELU6", do("ADD", x, 3.0)), 1 / 6)),
    "exp": _simple("EXP"),
    "log": _simple("LOG"),
    "sqrt": _simple("SQRT"),
    "rsqrt": _simple("RSQRT"),
    "reciprocal": _elementwise(lambda do, x, node: do("DIV", 1.0, x)),
    "neg": _simple("NEG"),
    "abs": _simple("ABS"),
    "pow_constant": _pow_constant,
}
PAIRS = (
    ("add", "ADD"), ("sub", "SUB"), ("mul", "MUL"), ("div", "DIV"), ("pow", "POW"), ("maximum", "MAXIMUM"),
    ("minimum", "MINIMUM"),
)  # fmt: skip
FLOAT |= {name: _binary(op) for name, op in PAIRS}
FLOAT |= {f"{name}_constant": _with_constant(op) for name, op in PAIRS if name != "pow"}
