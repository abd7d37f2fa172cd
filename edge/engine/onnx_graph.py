"""Just enough of ONNX to look into a model file and to hand its initialisers over: no `onnx` package on a device.

The messages below name the few fields we read or change. Protobuf carries every other field along untouched, so a file that is
decoded and encoded again says the same. They live in a descriptor pool of their own, beside an installed `onnx`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from refold.errors import BundleError

__all__ = ["OnnxGraph"]

EXTERNAL = 1  # TensorProto.DataLocation
BYTES = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
INT64 = descriptor_pb2.FieldDescriptorProto.TYPE_INT64
UINT8_TYPE = 2  # TensorProto.DataType
CHANNELS_LAST = [0, 2, 3, 1]
ENUM_OR_INT = descriptor_pb2.FieldDescriptorProto.TYPE_INT32
STRING = descriptor_pb2.FieldDescriptorProto.TYPE_STRING

# message -> field -> (number, type or message name, repeated); numbers are those of onnx.proto
FIELDS: dict[str, dict[str, tuple[int, int | str, bool]]] = {
    "Entry": {"key": (1, STRING, False), "value": (2, STRING, False)},
    "Tensor": {
        "float_data": (4, BYTES, False),
        "int32_data": (5, BYTES, False),
        "name": (8, STRING, False),
        "raw_data": (9, BYTES, False),
        "external_data": (13, "Entry", True),
        "data_location": (14, ENUM_OR_INT, False),
    },
    "Attribute": {"name": (1, STRING, False), "ints": (8, INT64, True)},
    "Node": {
        "input": (1, STRING, True),
        "output": (2, STRING, True),
        "op_type": (4, STRING, False),
        "attribute": (5, "Attribute", True),
        "domain": (7, STRING, False),
    },
    "Dim": {"value": (1, INT64, False), "name": (2, STRING, False)},
    "Shape": {"dim": (1, "Dim", True)},
    "TensorType": {"element": (1, ENUM_OR_INT, False), "shape": (2, "Shape", False)},
    "Type": {"tensor": (1, "TensorType", False)},
    "Value": {"name": (1, STRING, False), "type": (2, "Type", False)},
    "Graph": {
        "node": (1, "Node", True),
        "initializer": (5, "Tensor", True),
        "input": (11, "Value", True),
        "output": (12, "Value", True),
    },
    "Model": {"graph": (7, "Graph", False)},
}


def _model_class() -> Any:
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="refold_onnx_view.proto", package="refold_onnx_view", syntax="proto2")
    for message, fields in FIELDS.items():
        described = file.message_type.add(name=message)
        for name, (number, kind, repeated) in fields.items():
            one = described.field.add(name=name, number=number)
            one.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            if isinstance(kind, str):
                one.type, one.type_name = kinds.TYPE_MESSAGE, f".refold_onnx_view.{kind}"
            else:
                one.type = kind  # type: ignore[assignment]
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("refold_onnx_view.Model"))


_Model = _model_class()


class OnnxGraph:
    """A model file's main graph.

    Raises:
        BundleError: the bytes are no ONNX model.
    """

    def __init__(self, content: bytes) -> None:
        try:
            self._model = _Model.FromString(content)
        except DecodeError as e:
            raise BundleError("The model inside the bundle is not readable as ONNX: export it again.", code="damaged") from e

    def operators(self) -> Counter[str]:
        """How many nodes of each operator type the graph has."""
        return Counter(n.op_type for n in self._model.graph.node)

    def initialisers(self) -> set[str]:
        return {t.name for t in self._model.graph.initializer}

    def externals(self) -> set[str]:
        """Names of the initialisers whose values are not in the file."""
        return {t.name for t in self._model.graph.initializer if t.data_location == EXTERNAL}

    def with_external(self, names: Collection[str]) -> bytes:
        """The same model with the values of the named initialisers taken out, to be given when it is opened."""
        for tensor in self._model.graph.initializer:
            if tensor.name in names:
                for values in ("float_data", "int32_data", "raw_data", "external_data"):
                    tensor.ClearField(values)
                tensor.data_location = EXTERNAL
                tensor.external_data.add(key="location", value="adaptable")
        return bytes(self._model.SerializeToString(deterministic=True))

    def with_values(self, values: Mapping[str, NDArray[np.generic]]) -> bytes:
        """The same model with other values in the named initialisers, whose type and number of values they must have."""
        model = _Model.FromString(self._model.SerializeToString())
        for tensor in model.graph.initializer:
            if tensor.name in values:
                for held in ("float_data", "int32_data", "external_data", "data_location"):
                    tensor.ClearField(held)
                tensor.raw_data = np.ascontiguousarray(values[tensor.name]).tobytes()
        return bytes(model.SerializeToString(deterministic=True))

    def without_idle_clips(self, values: Mapping[str, NDArray[np.generic]]) -> bytes:
        """The same model without the Clips that change no code at these values: what quantises their output cuts as far.

        ONNX Runtime takes such a Clip out itself where the ranges are equal. Where they differ by less than half a step, 1.21
        to 1.30 leave two nodes of one name behind and do not open the model.

        Args:
            values: of the external initialisers, those of QuantizeLinear with the types they have in the file.
        """
        model = _Model.FromString(self._model.SerializeToString())
        graph = model.graph
        held = {t.name: t for t in graph.initializer}

        def value(node: Any, place: int, default: float) -> float:
            name = node.input[place] if len(node.input) > place else ""
            if name in values:
                return float(np.asarray(values[name]).reshape(-1)[0])
            content = held[name].raw_data or held[name].float_data if name in held else b""
            return float(np.frombuffer(content, np.float32)[0]) if len(content) == 4 else (np.nan if name else default)

        for clip in [n for n in graph.node if n.op_type == "Clip"]:
            quantise = _only_reader(graph, clip.output[0], "QuantizeLinear")
            if quantise is None or not all(name in values for name in quantise.input[1:3]) or len(quantise.input) != 3:
                continue
            scale, zero_point = (np.asarray(values[name]).reshape(-1)[0] for name in quantise.input[1:3])
            codes = np.iinfo(zero_point.dtype)
            ends = np.array([value(clip, 1, -np.inf), value(clip, 2, np.inf)], np.float32) / np.float32(scale)
            low, high = np.rint(ends) + int(zero_point)  # not a number where a bound is not known: then neither holds
            if low <= codes.min and high >= codes.max:
                quantise.input[0] = clip.input[0]
                graph.node.remove(clip)
        return bytes(model.SerializeToString(deterministic=True))

    def fed_with_codes(self) -> tuple[bytes, str, str] | None:
        """The same model with its first two operators taken off: its input is then codes, uint8 (N, H, W, C).

        Returns:
            (model, name of the input's scale, name of its zero point), or None when it does not begin with QuantizeLinear and a
            Transpose to channels last that nothing else looks at.
        """
        model = _Model.FromString(self._model.SerializeToString())
        graph = model.graph
        entries = [i for i in graph.input if i.name not in self.initialisers()]
        if len(entries) != 1:
            return None
        quantise = _only_reader(graph, entries[0].name, "QuantizeLinear")
        transpose = _only_reader(graph, quantise.output[0], "Transpose") if quantise is not None else None
        if (
            quantise is None
            or transpose is None
            or len(quantise.input) != 3
            or list(transpose.attribute[0].ints) != CHANNELS_LAST
        ):
            return None
        entry, dims = entries[0], list(entries[0].type.tensor.shape.dim)
        if len(dims) != 4:
            return None
        codes = transpose.output[0]
        for node in graph.node:
            for i, name in enumerate(node.input):
                if name == codes:
                    node.input[i] = entry.name
        scale, zero_point = quantise.input[1], quantise.input[2]
        graph.node.remove(quantise)
        graph.node.remove(transpose)
        entry.type.tensor.element = UINT8_TYPE
        copies = [type(dims[0]).FromString(dims[i].SerializeToString()) for i in CHANNELS_LAST]
        del entry.type.tensor.shape.dim[:]
        entry.type.tensor.shape.dim.extend(copies)
        return bytes(model.SerializeToString(deterministic=True)), scale, zero_point


def _only_reader(graph: Any, name: str, op_type: str) -> Any:
    readers = [n for n in graph.node if name in n.input]
    if len(readers) != 1 or readers[0].op_type != op_type or any(o.name == name for o in graph.output):
        return None
    return readers[0]
