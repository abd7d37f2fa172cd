"""Operators that move elements or keep the larger: the same on int8 codes and on floats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from export.ir import Node
from export.targets.litert_builder import LiteRtBuilder, Order, channels_last, plain
from export.targets.litert_shapes import is_same, reshaped_order, transposed_order
from export.targets.pooling import ceil_pads
from refold.errors import ModelError

__all__ = ["MOVES", "Side", "codes_side", "float_side", "padded"]

VALID, SAME = schema.Padding.VALID, schema.Padding.SAME


@dataclass(frozen=True)
class Side:
    """How a move reads its input and makes its output: in codes or in floats.

    Attributes:
        read: the input in an order.
        like_input: a new tensor of the input's scale.
        like_output: a new tensor of the output's scale.
        order: the order in which the input lies.
        lowest: what no element is smaller than.
    """

    read: Callable[[Order], int]
    like_input: Callable[[str, tuple[int, ...]], int]
    like_output: Callable[[str, tuple[int, ...]], int]
    order: Order
    lowest: tuple[float, type[np.generic]]
    codes: bool


def codes_side(b: LiteRtBuilder, node: Node) -> Side:
    source = node.inputs[0]
    return Side(
        lambda order: b.codes(source, order),
        lambda name, shape: b.code_tensor(source, name, shape),
        lambda name, shape: b.code_tensor(node.output, name, shape),
        b.order(source), (-128, np.int8), True,
    )  # fmt: skip


def float_side(b: LiteRtBuilder, node: Node) -> Side:
    source = node.inputs[0]
    lowest = (float(np.finfo(np.float32).min), np.float32)
    return Side(lambda order: b.real(source, order), b.tensor, b.tensor, b.order(source), lowest, False)


Move = Callable[[LiteRtBuilder, Node, Side], tuple[int, Order]]


def padded(
    b: LiteRtBuilder, node: Node, x: int, side: Side, before: list[int], after: list[int], *, lowest: bool = False
) -> int:
    """A tensor with zeros (or the lowest there is) around it; widths by stored axis."""
    shape = tuple(s + p + q for s, p, q in zip(b.shape(x), before, after, strict=True))
    out = side.like_input(f"{node.name}.padded", shape)
    widths = b.constant(f"{node.name}.pads", np.stack([before, after], 1), np.int32)
    if not lowest:
        b.operator("PAD", [x, widths], out)
        return out
    value, kind = side.lowest
    fill = side.like_input(f"{node.name}.lowest", (1,)) if side.codes else -1
    if side.codes:
        b.fill(fill, np.full(1, value, kind))
    else:
        fill = b.number(value)
    b.operator("PADV2", [x, widths, fill], out)
    return out


def _max_pool(b: LiteRtBuilder, node: Node, side: Side) -> tuple[int, Order]:
    a, order = node.attributes, channels_last(4)
    if any(d != 1 for d in a["dilations"]):
        raise ModelError(f"Layer {node.name} is a dilated max pooling, which LiteRT does not have.", code="operator")
    x, shape = side.read(order), b.stored(node.output, order)
    pads = ceil_pads(b.shape(x)[1:3], shape[1:3], a)
    padding = VALID
    if any(pads) and is_same(b.shape(x)[1:3], a["kernel"], a["strides"], (1, 1), pads):
        padding = SAME
    elif any(pads):
        positive = _never_negative(b, node.inputs[0])
        x = padded(b, node, x, side, [0, *pads[:2], 0], [0, *pads[2:], 0], lowest=not positive)
    out = side.like_output(node.name, shape)
    b.operator(
        "MAX_POOL_2D", [x], out, padding=padding, strideH=a["strides"][0], strideW=a["strides"][1],
        filterHeight=a["kernel"][0], filterWidth=a["kernel"][1],
    )  # fmt: skip
    return out, order


def _never_negative(b: LiteRtBuilder, value: str) -> bool:
    """Behind a ReLU zeros are as low as anything: the PAD that fast kernels have will do."""
    node = b.graph.producers().get(value)
    bounds = None if node is None else node.activation or (node.attributes.get("low"), 0)
    return bounds is not None and bounds[0] is not None and bounds[0] >= 0


def _reshape(b: LiteRtBuilder, node: Node, side: Side) -> tuple[int, Order]:
    before, after = b.sizes[node.inputs[0]], b.sizes[node.output]
    source = side.order
    order = reshaped_order(before, after, source)
    if order is None:
        source, order = plain(len(before)), plain(len(after))
    x, shape = side.read(source), b.stored(node.output, order)
    if b.shape(x) == shape:
        return x, order
    out = side.like_output(node.name, shape)
    b.operator("RESHAPE", [x, b.integers(*shape)], out, newShape=list(shape))
    return out, order


def _transpose(b: LiteRtBuilder, node: Node, side: Side) -> tuple[int, Order]:
    return side.read(side.order), transposed_order(side.order, node.attributes["axes"])


def _slice(b: LiteRtBuilder, node: Node, side: Side) -> tuple[int, Order]:
    a, order = node.attributes, side.order
    x, shape = side.read(order), b.stored(node.output, order)
    axis, size = order.index(a["axis"]), b.shape(side.read(order))[order.index(a["axis"])]
    begin, end, step = [0] * len(order), list(b.shape(x)), [1] * len(order)
    begin[axis], end[axis], _ = slice(a["start"], a["stop"], a["step"]).indices(size)
    step[axis] = a["step"]
    out = side.like_output(node.name, shape)
    b.operator("STRIDED_SLICE", [x, b.integers(*begin), b.integers(*end), b.integers(*step)], out)
    return out, order


def _pad(b: LiteRtBuilder, node: Node, side: Side) -> tuple[int, Order]:
    a, order = node.attributes, side.order
    x, shape = side.read(order), b.stored(node.output, order)
    widths = [[a[end][axis] for axis in order] for end in ("before", "after")]
    out = side.like_output(node.name, shape)
    b.operator("PAD", [x, b.constant(f"{node.name}.pads", np.stack(widths, 1), np.int32)], out)
    return out, order


def _upsample_nearest(b: LiteRtBuilder, node: Node, side: Side) -> tuple[int, Order]:
    order = channels_last(4)
    shape = b.stored(node.output, order)
    out = side.like_output(node.name, shape)
    b.operator("RESIZE_NEAREST_NEIGHBOR", [side.read(order), b.integers(*shape[1:3])], out)
    return out, order


MOVES: dict[str, Move] = {
    "max_pool": _max_pool,
    "reshape": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "pad": _pad,
    "upsample_nearest": _upsample_nearest,
}
