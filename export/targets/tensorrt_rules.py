"""TensorRT's documented rules for explicit quantisation and refitting, asked of a written file.

A file that breaks one is refused here, with the layer's name, and not on a device after minutes of building.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from refold.tensorrt import BuildRecipe

__all__ = ["Violation", "violations"]

DYNAMIC = {"Shape", "Size", "NonZero", "If", "Loop", "Scan", "Range", "ConstantOfShape"}
BETWEEN = ("Relu", "Clip", "BatchNormalization")  # what TensorRT fuses behind a layer, before its quantisation


@dataclass(frozen=True)
class Violation:
    """`layer`: the node's name, or what the file as a whole is called; `what`: a clause after it."""

    layer: str
    what: str


class _File:
    def __init__(self, content: bytes) -> None:
        self.graph = onnx.load_from_string(content).graph
        self.tensors = {t.name: t for t in self.graph.initializer}
        self.makers = {o: n for n in self.graph.node for o in n.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def value(self, name: str) -> np.ndarray:
        return np.asarray(numpy_helper.to_array(self.tensors[name]))

    def maker(self, name: str) -> str:
        """Type of the operator that makes a tensor; "" for an initialiser or an input."""
        return self.makers[name].op_type if name in self.makers else ""

    def quantised_behind(self, node: onnx.NodeProto) -> bool:
        """A layer's result reaches a QuantizeLinear, or the end, through nothing but its norm and its activation."""
        readers = self.readers.get(node.output[0], [])
        while len(readers) == 1 and readers[0].op_type in BETWEEN:
            readers = self.readers.get(readers[0].output[0], [])
        return all(r.op_type in ("QuantizeLinear", "Identity") for r in readers)


def violations(content: bytes, layers: tuple[str, ...], recipe: BuildRecipe, *, partial: bool = False) -> Iterator[Violation]:
    """What a file does not keep.

    Args:
        layers: names of the convolutions and linear layers that must run in integers.
        partial: the file may lack norms, as a tap model lacks those behind its last tap.
    """
    file = _File(content)
    yield from _static(file)
    for node in file.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield from _pair(file, node)
    nodes = {n.name: n for n in file.graph.node}
    for name in layers:
        yield from _layer(file, nodes.get(name), name)
    for site in recipe.sites:
        if partial and not set(site.initialisers) & set(file.tensors):
            continue
        norm = nodes.get(site.node)
        if site.node and (norm is None or norm.op_type != "BatchNormalization" or tuple(norm.input[1:]) != site.initialisers):
            yield Violation(site.site, "has no BatchNormalization of its own with the four vectors build.json names")
        for missing in set(site.initialisers) - set(file.tensors):
            yield Violation(site.site, f"lacks its vector {missing}")


def _static(file: _File) -> Iterator[Violation]:
    for value in (*file.graph.input, *file.graph.output):
        if any(d.dim_value < 1 for d in value.type.tensor_type.shape.dim):
            yield Violation(value.name, "has a shape that is not known")
    for tensor in file.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield Violation(tensor.name, "is outside the file, which TensorRT reads whole")
    names = [n.name for n in file.graph.node]
    for node in file.graph.node:
        if node.op_type in DYNAMIC:
            yield Violation(node.name, f"computes shapes ({node.op_type})")
        if names.count(node.name) > 1:
            yield Violation(node.name, "shares its name with another node")


def _pair(file: _File, node: onnx.NodeProto) -> Iterator[Violation]:
    if len(node.input) != 3 or node.input[1] not in file.tensors or node.input[2] not in file.tensors:
        yield Violation(node.name, "has no constant scale and zero point")
        return
    scale, zero_point = file.value(node.input[1]), file.value(node.input[2])
    constant = node.input[0] in file.tensors
    if zero_point.dtype != np.int8 or zero_point.any():
        yield Violation(node.name, "is not symmetric: its zero point is not 0 in int8")
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        yield Violation(node.name, "has a scale that is not positive")
    if scale.ndim and not (constant and node.op_type == "DequantizeLinear"):
        yield Violation(node.name, "has a scale for each channel although it is not of constant weights")
    if node.op_type == "DequantizeLinear" and not constant and file.maker(node.input[0]) != "QuantizeLinear":
        yield Violation(node.name, "dequantises what was not quantised")
    if node.op_type == "QuantizeLinear":
        for reader in file.readers.get(node.output[0], []):
            if reader.op_type != "DequantizeLinear":
                yield Violation(reader.name, "reads codes without dequantising them")


def _layer(file: _File, node: onnx.NodeProto | None, name: str) -> Iterator[Violation]:
    if node is None or node.op_type not in ("Conv", "Gemm"):
        yield Violation(name, "is not a convolution or linear layer of the file")
        return
    if {file.maker(i) for i in node.input[:2]} != {"DequantizeLinear"}:
        yield Violation(name, "does not read dequantised codes and weights")
        return
    weights = file.makers[node.input[1]].input[0]
    codes = file.value(weights) if weights in file.tensors else np.full(1, -128)
    if codes.min() < -127:
        yield Violation(name, "has weights that are not symmetric int8 codes")
    if not file.quantised_behind(node):
        yield Violation(name, "is not quantised directly behind its norm and activation")
