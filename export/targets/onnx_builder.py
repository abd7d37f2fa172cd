"""Builds an ONNX graph of quantise/dequantise pairs: names, initialisers (inline or to be given later), codes and floats."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.ir import Node
from export.quantise import IntegerModel, WeightCodes
from refold.packing import MOST_BITS

__all__ = ["IR_VERSION", "OPSET", "OnnxBuilder"]

OPSET = 17  # LayerNormalization; everything else is older. ONNX Runtime 1.20 reads it
IR_VERSION = 8
RESERVED = ("input", "logits", "moments", "batch", "all")
ROLES = ("weight", "bias", "gamma", "beta", "value", "ones")  # of parameters: no name made here ends so
KINDS = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
}


class OnnxBuilder:
    """For each value v: `v` (float as computed), `v.q` (codes), `v.dq` (float again). Made only when asked for.

    Args:
        embedded: adaptable tensors are stored with their exported values; otherwise they are external references without data,
            and so are integers of few bits.

    Attributes:
        pictures: the size of the batch in the file.
    """

    pictures: int | str = "batch"

    def __init__(self, model: IntegerModel, *, embedded: bool = False) -> None:
        self.model = model
        self.graph = model.graph
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, onnx.TensorProto] = {}
        self.packed: dict[str, WeightCodes] = {}
        self._made: set[str] = set()
        self._named: set[str] = set()
        self._embedded = embedded
        self._contents: dict[str, bytes] = {}
        values = [self.graph.input, *(n.output for n in self.graph.nodes)]
        self._layers = {n.name: n.output for n in self.graph.nodes}
        self._ours = {*values, *(n.name for n in self.graph.nodes), *RESERVED}  # what names made here begin with
        for name, value in self.adaptable().items():
            self.tensors[name] = numpy_helper.from_array(np.asarray(value), name) if embedded else _external(name, value)

    def adaptable(self) -> dict[str, NDArray[np.generic]]:
        """The tensors a device may change, by name, as exported."""
        return self.model.table.tensors()

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Adds a node unless its output is there already. Returns the output's name."""
        if output not in self._made:
            self._made.add(output)
            given = {k: v for k, v in attributes.items() if v is not None}
            name = self._node_name(given.pop("name", ""), op, output)
            self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **given))
        return output

    def _node_name(self, layer: str, op: str, output: str) -> str:
        """The layer's name, else the output's, which gives way to a layer called so: two nodes of one name are no model."""
        name = layer or (output if self._layers.get(output, output) == output else f"{output}/{op}")
        while name in self._named:
            name += "/"
        self._named.add(name)
        return name

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        """Name of an inline initialiser with this value: `name`, unless something else has it already."""
        array = np.ascontiguousarray(value, dtype)
        content = hashlib.sha256(f"{array.shape}{array.dtype}".encode() + array.tobytes()).digest()
        found, count = name, 2
        while found in self.tensors and self._contents.get(found) != content:
            found, count = f"{name}_{count}", count + 1
        if found not in self.tensors:
            self.tensors[found], self._contents[found] = numpy_helper.from_array(array, found), content
        return found

    def weight_codes(self, node: Node) -> tuple[str, str]:
        """Names of an integer layer's codes, sign included, and of their zero point; few bits are left out of the file."""
        codes, bits = self.model.codes(node), self.model.weights[node.output].bits
        name = f"{node.name}.codes"
        if bits > MOST_BITS or self._embedded:
            self.constant(name, codes, np.int8)
        elif name not in self.tensors:
            self.packed[name] = replace(self.model.weights[node.output], codes=codes)
            self.tensors[name] = _external(name, codes)
        return name, self.constant(f"{name}.zero_point", np.zeros(codes.shape[0], np.int8), np.int8)

    def integers(self, name: str, *values: int) -> str:
        return self.constant(name, np.asarray(values, np.int64), np.int64)

    def parameter(self, node: Node, role: str) -> str:
        """The float constant of a node's role; where it is stored so, from 16-bit codes.

        A cast and a multiplication, which ONNX Runtime does once, when it loads the model. Its DequantizeLinear of 16-bit codes
        asks for opset 21 and runs at every inference.
        """
        held = node.parameters[role]
        stored, name = self.model.stored.get(held), self._apart(held)
        if stored is None:
            return self.constant(name, self.graph.constants[held])
        codes = self.constant(f"{name}.codes", stored.codes, np.int16)
        whole = self.node("Cast", [codes], f"{name}.whole", to=TensorProto.FLOAT)
        return self.node("Mul", [whole, self.constant(f"{name}.step", stored.step)], f"{name}.real")

    def _apart(self, name: str) -> str:
        """A parameter's name unless a name made here could be the same (`mul.scale` of a module called mul); else another."""
        stem, _, last = name.rpartition(".")
        ours = name in self._ours or (stem.partition(".")[0] in self._ours and last.rstrip("_") not in ROLES)
        return f"parameter/{name}" if ours else name

    def scale(self, value: str) -> tuple[str, str]:
        """Names of the scale and zero point tensors of a quantised value."""
        source = self.model.placement.scale_of[value]
        return f"{source}.scale", f"{source}.zero_point"

    def quantised(self, value: str) -> bool:
        return self.model.placement.is_quantised(value)

    def codes(self, value: str) -> str:
        """Name of a quantised value's uint8 codes, from `value` in float unless an operator already made them.

        QuantizeLinear stops at 255; where there are fewer codes the smaller of two codes is taken behind it.
        """
        top = self.model.levels.get(value, 256) - 1
        if top == 255:
            return self.node("QuantizeLinear", [value, *self.scale(value)], f"{value}.q")
        wide = self.node("QuantizeLinear", [value, *self.scale(value)], f"{value}.q8")
        return self.node("Min", [wide, self.constant(f"top.{top}", np.asarray(top), np.uint8)], f"{value}.q")

    def real(self, value: str) -> str:
        """Name of what readers of a value see: dequantised codes, or the float itself."""
        if not self.quantised(value):
            return value
        return self.node("DequantizeLinear", [self.codes(value), *self.scale(value)], f"{value}.dq")

    def clamped(self, node: Node, source: str, output: str) -> str:
        """The absorbed activation function, `source` to `output`. It is written; a runtime drops it where the codes clamp."""
        low, high = node.activation or (-np.inf, np.inf)
        if self.model.levels.get(output, 256) < 256:
            high = np.inf  # the highest code says it, and ONNX Runtime would not see through a second bound
        if low == 0 and np.isinf(high):
            return self.node("Relu", [source], output)
        bounds = [self.constant(f"clip.{b:g}", b) if np.isfinite(b) else "" for b in (low, high)]
        return self.node("Clip", [source, *bounds] if bounds[1] else [source, bounds[0]], output)

    def finished(self, output: str, shape: Sequence[int | str]) -> bytes:
        """The model's bytes. `output` is an existing tensor's name."""
        size = list(self.graph.shapes[self.graph.input])[1:]
        entry = helper.make_tensor_value_info(self.graph.input, TensorProto.FLOAT, [self.pictures, *size])
        answer = helper.make_tensor_value_info(output, TensorProto.FLOAT, list(shape))
        graph = helper.make_graph(self.nodes, "refold", [entry], [answer], list(self.tensors.values()))
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        made.producer_name = "refold"
        return bytes(made.SerializeToString(deterministic=True))


def _external(name: str, value: NDArray[np.generic]) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=KINDS[value.dtype], dims=value.shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="adaptable")
    return tensor
