"""The operators that functional programs have in place of writes, and tensors made to be written into.

A part that is written is a concatenation of what was before it, itself, and what is behind it. What such a concatenation was
made of is remembered, so that reading a part back, or writing the next one beside it, needs no copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from export.aten import cut, refuse, with_batch
from export.lower import Lowering, handles

aten = torch.ops.aten
MOST_PIECES = 512


def _full(low: Lowering, node: fx.Node, value: float) -> str:
    """A tensor of one number, for every image."""
    shape = low.shape_of(node)
    if node.meta["val"].dtype != torch.float32:
        raise refuse(low, node, f"makes activations of {node.meta['val'].dtype}: export the float32 model")
    if shape[:1] != (-1,) or -1 in shape[1:]:
        raise refuse(low, node, "makes a tensor with the batch on another axis than the first")
    return with_batch(low, node, torch.full((1, *shape[1:]), value), node.name)


@handles(
    aten.zeros_like.default, aten.new_zeros.default, aten.zeros.default, aten.zero.default,
    aten.empty_like.default, aten.new_empty.default, aten.empty.memory_format,
)  # fmt: skip
def zeros(low: Lowering, node: fx.Node, out: str) -> str:
    return _full(low, node, 0.0)


@handles(aten.ones_like.default, aten.new_ones.default, aten.ones.default)
def ones(low: Lowering, node: fx.Node, out: str) -> str:
    return _full(low, node, 1.0)


@handles(aten.full_like.default, aten.full.default, aten.fill.Scalar, aten.fill.Tensor)
def full(low: Lowering, node: fx.Node, out: str) -> str:
    value = low.arg(node, 1)
    if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.numel() == 1):
        raise refuse(low, node, "fills a tensor with a number that depends on the image")
    return _full(low, node, float(value))


@handles(aten.new_full.default)
def new_full(low: Lowering, node: fx.Node, out: str) -> str:
    return _full(low, node, float(low.arg(node, 2)))


@handles(aten.copy.default)
def copy(low: Lowering, node: fx.Node, out: str) -> str:
    """The second argument, spread over the shape of the first."""
    value, shape = low.arg(node, 1), low.shape_of(node)
    if node.meta["val"].dtype != torch.float32:
        raise refuse(low, node, f"writes activations into a tensor of {node.meta['val'].dtype}")
    if isinstance(value, (int, float)):
        value = torch.tensor(float(value))
    if isinstance(value, Tensor):
        if shape[:1] != (-1,):
            raise refuse(low, node, "writes a constant into a tensor whose first axis is not the batch")
        return with_batch(low, node, value.to(torch.float32).expand(1, *shape[1:]).contiguous(), out)
    source = node.args[1]
    if isinstance(source, fx.Node) and low.shape_of(source) == shape:
        return str(value)
    ones = torch.ones([1 if s == -1 else s for s in shape])
    return low.add("mul_constant", [value], out, parameters={"value": ones})


@handles(aten.slice_scatter.default)
def slice_scatter(low: Lowering, node: fx.Node, out: str) -> Any:
    shape = low.shape_of(node)
    axis = low.arg(node, 2, "dim", 0) % len(shape)
    start, stop, step = low.arg(node, 3, "start"), low.arg(node, 4, "end"), low.arg(node, 5, "step", 1)
    if shape[axis] == -1:
        if start in (None, 0) and stop in (None, 2**63 - 1) and step == 1:
            return low.arg(node, 1)
        raise refuse(low, node, "writes into a part of the batch")
    return _written(low, node, out, low.arg(node, 1), axis, range(*slice(start, stop, step).indices(shape[axis])))


@handles(aten.select_scatter.default)
def select_scatter(low: Lowering, node: fx.Node, out: str) -> Any:
    shape, value = low.shape_of(node), low.arg(node, 1)
    axis = low.arg(node, 2) % len(shape)
    if shape[axis] == -1:
        raise refuse(low, node, "writes into one image of the batch")
    index = low.arg(node, 3) % shape[axis]
    if isinstance(value, Tensor):
        value = value.unsqueeze(axis)
    else:
        value = low.reshape(value, f"{out}_row", (*shape[:axis], 1, *shape[axis + 1 :]), low.layer(node))
    return _written(low, node, out, value, axis, range(index, index + 1))


def _written(low: Lowering, node: fx.Node, out: str, value: Any, axis: int, rows: range) -> Any:
    """The first argument of `node` with `value` in the given rows of an axis."""
    shape, whole = low.shape_of(node), low.arg(node, 0)
    if not rows:
        return whole
    if len(rows) == shape[axis]:
        return value
    if 2 * len(rows) > MOST_PIECES and rows.step > 1:
        raise refuse(low, node, f"writes every {rows.step}th of {shape[axis]} rows in place: concatenate or reshape instead")
    value, whole = (
        with_batch(low, node, v.expand(1, *v.shape[1:]), f"{out}_{k}") if isinstance(v, Tensor) else v
        for v, k in ((value, "new"), (whole, "old"))
    )
    parts: list[tuple[str, int]] = []
    blocks = [range(len(rows))] if rows.step == 1 else [range(i, i + 1) for i in range(len(rows))]
    made = (*shape[:axis], len(rows), *shape[axis + 1 :])
    end = 0
    for i, block in enumerate(blocks):
        first, last = rows[block[0]], rows[block[-1]] + 1
        parts += cut(low, whole, f"{out}_{i}old", shape, axis, end, first)
        parts += cut(low, value, f"{out}_{i}new", made, axis, block[0], block[-1] + 1)
        end = last
    parts += cut(low, whole, f"{out}_rest", shape, axis, end, shape[axis])
    result = low.add("concat", [name for name, _ in parts], out, axis=axis, shape_made=shape)
    low.pieces[result] = (axis, parts)
    return result
