"""Builds a TFLite file: tensors, operators, and which tensor carries which adaptable tensor of the norm table.

TFLite's kernels want the channels last; the graph has them second. Nothing is transposed for that: every value remembers the
*order* its tensor is stored in (stored axis j holds axis order[j] of the graph), transpositions of the graph only change that
note, and a TRANSPOSE is written where a reader cannot take the order it finds.

A value has up to three forms, made when first asked for:

    raw     float32 as its operator computed it
    codes   int8, where the value is quantised: 128 less than the norm table's unsigned codes
    real    what float readers see: dequantised codes, or raw where nothing is quantised
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from export.ir import Node
from export.quantise import IntegerModel, WeightCodes
from refold.errors import ModelError
from refold.packing import MOST_BITS
from refold.tflite import ADAPTABLE, CODE_OFFSET, PACKED

__all__ = ["LiteRtBuilder", "Order", "channels_last", "plain"]

Order = tuple[int, ...]
Array = NDArray[np.generic]
ALIGNMENT = 16  # of buffers: kernels read int32 and vectors of bytes straight from the file
KINDS = {
    np.dtype(np.float32): schema.TensorType.FLOAT32,
    np.dtype(np.int32): schema.TensorType.INT32,
    np.dtype(np.int16): schema.TensorType.INT16,
    np.dtype(np.int8): schema.TensorType.INT8,
}
# operator → (name of its options, lowest version that has all we use: schema.fbs and tflite's op_version.cc)
OPERATORS: dict[str, tuple[str, int]] = {
    "ABS": ("AbsOptions", 1),
    "ADD": ("AddOptions", 2),
    "AVERAGE_POOL_2D": ("Pool2DOptions", 2),
    "BATCH_MATMUL": ("BatchMatMulOptions", 1),
    "CAST": ("CastOptions", 1),
    "CONCATENATION": ("ConcatenationOptions", 2),
    "CONV_2D": ("Conv2DOptions", 6),
    "DEPTHWISE_CONV_2D": ("DepthwiseConv2DOptions", 3),
    "DEQUANTIZE": ("DequantizeOptions", 5),
    "DIV": ("DivOptions", 1),
    "ELU": ("", 1),
    "EXP": ("ExpOptions", 1),
    "FULLY_CONNECTED": ("FullyConnectedOptions", 12),
    "GELU": ("GeluOptions", 1),
    "HARD_SWISH": ("HardSwishOptions", 1),
    "LEAKY_RELU": ("LeakyReluOptions", 2),
    "LOG": ("", 1),
    "LOGISTIC": ("", 1),
    "LOG_SOFTMAX": ("LogSoftmaxOptions", 1),
    "MAXIMUM": ("MaximumMinimumOptions", 1),
    "MAX_POOL_2D": ("Pool2DOptions", 2),
    "MEAN": ("ReducerOptions", 2),
    "MINIMUM": ("MaximumMinimumOptions", 2),
    "MUL": ("MulOptions", 2),
    "NEG": ("NegOptions", 1),
    "PAD": ("PadOptions", 2),
    "PADV2": ("PadV2Options", 2),
    "POW": ("PowOptions", 1),
    "PRELU": ("", 1),
    "QUANTIZE": ("QuantizeOptions", 2),
    "REDUCE_MAX": ("ReducerOptions", 1),
    "RELU": ("", 2),
    "RELU6": ("", 2),
    "RESHAPE": ("ReshapeOptions", 1),
    "RESIZE_BILINEAR": ("ResizeBilinearOptions", 3),
    "RESIZE_NEAREST_NEIGHBOR": ("ResizeNearestNeighborOptions", 2),
    "RSQRT": ("", 1),
    "SIGN": ("SignOptions", 1),
    "SOFTMAX": ("SoftmaxOptions", 1),
    "SQRT": ("", 1),
    "SQUARED_DIFFERENCE": ("SquaredDifferenceOptions", 1),
    "STRIDED_SLICE": ("StridedSliceOptions", 2),
    "SUB": ("SubOptions", 1),
    "SUM": ("ReducerOptions", 1),
    "TANH": ("", 1),
    "TRANSPOSE": ("TransposeOptions", 2),
    "TRANSPOSE_CONV": ("TransposeConvOptions", 1),
}


def plain(rank: int) -> Order:
    """The graph's own order."""
    return tuple(range(rank))


def channels_last(rank: int) -> Order:
    """Axis 1 behind all others: NHWC for NCHW."""
    return plain(rank) if rank < 3 else (0, *range(2, rank), 1)


class _Builder(flatbuffers.Builder):  # type: ignore[misc]
    """Byte vectors begin at multiples of 16: the generated code does not know of `force_align`."""

    def StartVector(self, elemSize: int, numElems: int, alignment: int) -> Any:  # noqa: N802
        return super().StartVector(elemSize, numElems, ALIGNMENT if elemSize == 1 else alignment)


class LiteRtBuilder:
    """Args:
    model: what to write.
    sizes: every value's shape for one picture, in the graph's order.
    embedded: write weights of few bits too; otherwise they are left blank, to be expanded from the bundle's packed copy.
    """

    def __init__(self, model: IntegerModel, sizes: Mapping[str, tuple[int, ...]], *, embedded: bool = False) -> None:
        self.packed: dict[str, WeightCodes] = {}
        self._blank: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._embedded = embedded
        self.model, self.graph, self.sizes = model, model.graph, sizes
        self.values = model.table.tensors()
        self.scales = {a.tensor: a for a in model.table.activations}
        self.names = {n.output: n.name for n in model.graph.nodes} | {model.graph.input: model.graph.input}
        self._tensors: list[Any] = []
        self._buffers: list[Any] = [schema.BufferT()]
        self._operators: list[Any] = []
        self._codes: dict[str, int] = {}
        self._constants: dict[str, int] = {}
        self._carriers: dict[str, list[tuple[str, int]]] = {}
        self._held: dict[tuple[str, str, Order], int] = {}
        self._made: dict[str, tuple[str, Order]] = {}
        self._named: dict[str, int] = {}

    # Tensors -----------------------------------------------------------------------------------------------------------------

    def tensor(self, name: str, shape: Sequence[int], dtype: Any = np.float32, data: Array | None = None) -> int:
        """A new tensor; its index. A name taken already gets a number."""
        made, dtype = schema.TensorT(), np.dtype(dtype)
        count = self._named.get(name, 0)
        self._named[name] = count + 1
        made.name = f"{name}.{count}" if count else name
        made.shape, made.type, made.buffer = [int(s) for s in shape], KINDS[dtype], 0
        self._tensors.append(made)
        if data is not None:
            self.fill(len(self._tensors) - 1, np.ascontiguousarray(data, dtype))
        return len(self._tensors) - 1

    def fill(self, tensor: int, data: Array) -> None:
        """Gives a tensor its value, in a buffer of its own: patching one never reaches another."""
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(data.tobytes(), np.uint8)
        self._buffers.append(buffer)
        self._tensors[tensor].buffer = len(self._buffers) - 1

    def weights(self, node: Node, axes: Sequence[int]) -> int:
        """The int8 tensor of an integer layer's codes, sign included, in the layout `axes` make of the graph's."""
        held, codes = self.model.weights[node.output], self.model.codes(node)
        turned, name = codes.transpose(axes), f"{node.name}.codes"
        blank = held.bits <= MOST_BITS and not self._embedded
        made = self.tensor(f"{node.name}.weight", turned.shape, np.int8, np.zeros_like(turned) if blank else turned)
        if blank:
            self.packed[name] = replace(held, codes=codes)
            self._blank[name] = (made, tuple(axes))
        return made

    def quantise(self, tensor: int, scale: Any, zero_point: int = 0, axis: int = 0) -> None:
        """Gives a tensor its scale, or scales along `axis`."""
        q = schema.QuantizationParametersT()
        q.scale = np.atleast_1d(np.asarray(scale, np.float32))
        q.zeroPoint = np.full(q.scale.shape, zero_point, np.int64)
        q.quantizedDimension = axis
        self._tensors[tensor].quantization = q

    def carries(self, tensor: int, role: str, name: str) -> None:
        """Notes that a tensor holds an adaptable tensor of the norm table."""
        self._carriers.setdefault(name, []).append((role, tensor))

    def adaptable(self, name: str, shape: Sequence[int] | None = None) -> int:
        """A tensor whose own data is an adaptable vector."""
        if name not in self._constants:
            value = self.values[name]
            self._constants[name] = self.tensor(name, shape or value.shape, value.dtype, value)
            self.carries(self._constants[name], "data", name)
        return self._constants[name]

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> int:
        """A constant; the same name and value give the same tensor."""
        array = np.ascontiguousarray(value, dtype)
        key = f"{name}|{array.shape}|{array.dtype}|{hashlib.sha256(array.tobytes()).hexdigest()}"
        if key not in self._constants:
            self._constants[key] = self.tensor(name, array.shape, dtype, array)
        return self._constants[key]

    def integers(self, *values: int) -> int:
        return self.constant("int." + "_".join(map(str, values)), values, np.int32)

    def number(self, value: float) -> int:
        return self.constant(f"{np.float32(value):.9g}", value)

    def shape(self, tensor: int) -> tuple[int, ...]:
        return tuple(self._tensors[tensor].shape)

    def code_tensor(self, value: str, name: str, shape: Sequence[int]) -> int:
        """An int8 tensor with the scale and zero point of a quantised value."""
        made = self.tensor(name, shape, np.int8)
        scale = self.scales[self.model.placement.scale_of[value]]
        self.quantise(made, scale.scale, scale.zero_point - CODE_OFFSET)
        self.carries(made, "scale", scale.scale_tensor)
        self.carries(made, "zero_point", scale.zero_point_tensor)
        return made

    def narrowed(self, value: str, tensor: int) -> int:
        """Codes cut off at the value's highest where it has fewer than 256; the kernels themselves stop at 127."""
        top = self.model.levels.get(value, 256) - 1
        if top == 255:
            return tensor
        name = self.names.get(value, value)
        bound = self.code_tensor(value, f"{name}.top", (1,))
        self.fill(bound, np.array([top - CODE_OFFSET], np.int8))
        out = self.code_tensor(value, f"{name}.narrow", self.shape(tensor))
        self.operator("MINIMUM", [tensor, bound], out)
        return out

    def operator(self, op: str, inputs: Sequence[int], outputs: int | Sequence[int], **options: Any) -> None:
        """Adds an operator. Options by the schema's own names."""
        union, _ = OPERATORS[op]
        made = schema.OperatorT()
        made.opcodeIndex = self._codes.setdefault(op, len(self._codes))
        made.inputs, made.outputs = list(inputs), [outputs] if isinstance(outputs, int) else list(outputs)
        if union:
            made.builtinOptionsType = getattr(schema.BuiltinOptions, union)
            made.builtinOptions = getattr(schema, f"{union}T")()
            for name, value in options.items():
                if not hasattr(made.builtinOptions, name):
                    raise TypeError(f"{union} has no {name}")
                setattr(made.builtinOptions, name, value)
        self._operators.append(made)

    def float_operator(self, op: str, inputs: Sequence[int], name: str, shape: Sequence[int], **options: Any) -> int:
        """An operator with one new float32 output; the output's index."""
        made = self.tensor(name, shape)
        self.operator(op, inputs, made, **options)
        return made

    def requantised(self, tensor: int, out: int) -> None:
        """Codes of one scale into codes of another, through float32: XNNPACK's direct conversion has an 8-bit multiplier, which
        moves codes by a quarter of a step (ViT and DenseNet notice)."""
        name = self._tensors[out].name
        self.operator("QUANTIZE", [self.float_operator("DEQUANTIZE", [tensor], f"{name}.between", self.shape(tensor))], out)

    # Values ------------------------------------------------------------------------------------------------------------------

    def quantised(self, value: str) -> bool:
        return self.model.placement.is_quantised(value)

    def put(self, value: str, form: str, tensor: int, order: Order) -> None:
        """Says where a value's operator left its result: `raw` or `codes`."""
        self._held[value, form, order] = tensor
        self._made.setdefault(value, (form, order))

    def order(self, value: str) -> Order:
        """The order a value was made in."""
        return self._made[value][1]

    def rank(self, value: str) -> int:
        return len(self.sizes[value])

    def stored(self, value: str, order: Order) -> tuple[int, ...]:
        """A value's shape in an order."""
        return tuple(self.sizes[value][i] for i in order)

    def codes(self, value: str, order: Order | None = None) -> int:
        """The int8 codes of a quantised value, in this order or the one it was made in."""
        return self._form(value, "codes", order)

    def real(self, value: str, order: Order | None = None) -> int:
        """What float readers of a value see."""
        return self._form(value, "real" if self.quantised(value) else "raw", order)

    def _form(self, value: str, form: str, order: Order | None) -> int:
        order = order or self.order(value)
        found = self._held.get((value, form, order))
        if found is None:
            found = self._held[value, form, order] = self._convert(value, form, order)
        return found

    def _convert(self, value: str, form: str, order: Order) -> int:
        name, made = self.names.get(value, value), self.order(value)
        shape = self.stored(value, order)
        if order != made and form != "real":
            source = self._form(value, form, made)
            turned = f"{name}.{'x'.join(map(str, order))}"
            result = self.code_tensor(value, turned, shape) if form == "codes" else self.tensor(turned, shape)
            self.operator("TRANSPOSE", [source, self.integers(*(made.index(axis) for axis in order))], result)
            return result
        if form == "codes":
            result = self.code_tensor(value, f"{name}.codes", shape)
            self.operator("QUANTIZE", [self._form(value, "raw", order)], result)
            return self.narrowed(value, result)
        if form == "real":
            return self.float_operator("DEQUANTIZE", [self._form(value, "codes", order)], f"{name}.real", shape)
        raise ModelError(f"Layer {name} has no float result to read.", code="operator")

    def finished(self, inputs: Sequence[int], output: int, name: str) -> bytes:
        """The file's bytes; the output tensor gets this name."""
        self._tensors[output].name = name
        graph = schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = "main", self._tensors, self._wanted(output)
        graph.inputs, graph.outputs = list(inputs), [output]
        model = schema.ModelT()
        model.version, model.description, model.subgraphs = 3, "refold", [graph]
        model.operatorCodes = [_operator_code(op) for op in self._codes]
        model.metadata, model.buffers = [], list(self._buffers)
        for kind, said in ((ADAPTABLE, self._carriers), (PACKED, self._blank)):
            if not said and kind == PACKED:
                continue
            metadata, buffer = schema.MetadataT(), schema.BufferT()
            buffer.data = np.frombuffer(json.dumps(dict(sorted(said.items())), separators=(",", ":")).encode(), np.uint8)
            metadata.name, metadata.buffer = kind, len(model.buffers)
            model.metadata.append(metadata)
            model.buffers.append(buffer)
        builder = _Builder(1 << 16)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _wanted(self, output: int) -> list[Any]:
        """The operators that lead to the output: LiteRT runs whatever stands in the file."""
        needed, kept = {output}, []
        for operator in reversed(self._operators):
            if needed.intersection(operator.outputs):
                needed.update(operator.inputs)
                kept.append(operator)
        return kept[::-1]


def _operator_code(op: str) -> Any:
    made, number = schema.OperatorCodeT(), getattr(schema.BuiltinOperator, op)
    made.deprecatedBuiltinCode, made.builtinCode, made.version = min(number, 127), number, OPERATORS[op][1]
    return made
