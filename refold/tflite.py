"""Just enough of the TFLite format to look into a model file and to put other norms into a copy of it, in place.

A file is a FlatBuffer: tables whose fields are found through a vtable of offsets. Only the fields named below are read, every
offset is checked against the file's length, and nothing ever moves: a patched copy has the length of the original, and every
byte that carries no adaptable tensor is the same. (The reader in `ai_edge_litert.schema_py_generated` takes a third of a second
to import and follows offsets out of a damaged file.)

Which tensor of the file carries which adaptable tensor of the norm table is said by the file itself, in a metadata entry:
JSON, adaptable name → list of [role, tensor index], with the roles

    scale        the tensor's quantisation scales, float32
    zero_point   its zero points; 128 less than in the norm table, because codes are signed here
    data         the tensor's own buffer

A second entry lists the weights of fewer than 7 bits, which the file leaves blank because the bundle keeps one packed copy for
all targets: their name there → [tensor index, axes], where axes transpose the packed tensor into this file's layout.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refold.errors import BundleError

__all__ = ["ADAPTABLE", "CODE_OFFSET", "PACKED", "Operator", "Tensor", "TfliteFile", "open_interpreter"]

log = logging.getLogger(__name__)
ADAPTABLE = "refold.adaptable"
PACKED = "refold.packed"
CODE_OFFSET = 128  # unsigned code of the norm table minus signed code of the file
IDENTIFIER = b"TFL3"
LAYERS = (3, 4, 9)  # BuiltinOperator CONV_2D, DEPTHWISE_CONV_2D, FULLY_CONNECTED
# what following a wrong offset, or decoding what it leads to, may raise
UNREADABLE = (struct.error, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, MemoryError)
ROLES = ("scale", "zero_point", "data")
KINDS: dict[int, type[np.generic]] = {0: np.float32, 2: np.int32, 4: np.int64, 7: np.int16, 9: np.int8}

# Field numbers of schema.fbs
MODEL_OPCODES, MODEL_SUBGRAPHS, MODEL_BUFFERS, MODEL_METADATA = 1, 2, 4, 6
OPCODE_OLD, OPCODE_CUSTOM, OPCODE_NEW = 0, 1, 3
GRAPH_TENSORS, GRAPH_INPUTS, GRAPH_OUTPUTS, GRAPH_OPERATORS = 0, 1, 2, 3
TENSOR_SHAPE, TENSOR_TYPE, TENSOR_BUFFER, TENSOR_NAME, TENSOR_QUANTISATION = 0, 1, 2, 3, 4
QUANTISATION_SCALE, QUANTISATION_ZERO_POINT = 2, 3
OPERATOR_OPCODE, OPERATOR_INPUTS, OPERATOR_OUTPUTS = 0, 1, 2
BUFFER_DATA, BUFFER_OFFSET, BUFFER_SIZE = 0, 1, 2
METADATA_NAME, METADATA_BUFFER = 0, 1


@dataclass(frozen=True)
class Place:
    """Bytes of the file: `size` of them from `start`."""

    start: int = 0
    size: int = 0


@dataclass(frozen=True)
class Tensor:
    """One tensor. `kind` is None for element types Refold does not write; a place of size 0: the file has no such thing."""

    name: str
    shape: tuple[int, ...]
    kind: type[np.generic] | None
    data: Place
    scale: Place
    zero_point: Place


@dataclass(frozen=True)
class Operator:
    """`builtin`: number of the operator in schema.fbs; `inputs` and `outputs` index the tensors, -1 for an input left out."""

    builtin: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class _Reader:
    """FlatBuffer primitives. Raises struct.error or IndexError wherever an offset leads out of the file."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def u32(self, at: int) -> int:
        return int(struct.unpack_from("<I", self.content, at)[0])

    def field(self, table: int, number: int) -> int:
        """Where a table's field is, or 0 when the table leaves it out."""
        vtable = table - int(struct.unpack_from("<i", self.content, table)[0])
        if vtable < 0:
            raise IndexError(vtable)
        size = int(struct.unpack_from("<H", self.content, vtable)[0])
        slot = 4 + 2 * number
        if slot + 2 > size:
            return 0
        offset = int(struct.unpack_from("<H", self.content, vtable + slot)[0])
        return table + offset if offset else 0

    def scalar(self, table: int, number: int, code: str, default: int = 0) -> int:
        at = self.field(table, number)
        return int(struct.unpack_from(f"<{code}", self.content, at)[0]) if at else default

    def vector(self, table: int, number: int, size: int) -> tuple[int, int]:
        """(start, count) of a vector of elements of `size` bytes."""
        at = self.field(table, number)
        if not at:
            return 0, 0
        at += self.u32(at)
        count = self.u32(at)
        if at + 4 + count * size > len(self.content):
            raise IndexError(at)
        return at + 4, count

    def place(self, table: int, number: int, size: int) -> Place:
        start, count = self.vector(table, number, size)
        return Place(start, count * size)

    def tables(self, table: int, number: int) -> list[int]:
        start, count = self.vector(table, number, 4)
        return [start + 4 * i + self.u32(start + 4 * i) for i in range(count)]

    def ints(self, table: int, number: int) -> tuple[int, ...]:
        start, count = self.vector(table, number, 4)
        return struct.unpack_from(f"<{count}i", self.content, start)

    def text(self, table: int, number: int) -> str:
        start, count = self.vector(table, number, 1)
        return self.content[start : start + count].decode()


class TfliteFile:
    """A model file with one subgraph.

    Attributes:
        content: the bytes as given.
        tensors, operators: of the subgraph, in the file's order.
        inputs, outputs: tensor indices.
        adaptable: name in the norm table → (role, tensor index), as often as the file holds it.
        packed: name among the bundle's packed weights → (tensor index, axes); blank until `expanded`.

    Raises:
        BundleError: the bytes are no TFLite model, or are damaged.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content
        try:
            self._read(_Reader(content))
        except UNREADABLE as e:
            raise BundleError(
                "The model inside the bundle is not readable as TFLite: export it again.", code="damaged", detail=repr(e)
            ) from e

    def _read(self, r: _Reader) -> None:
        if self.content[4:8] != IDENTIFIER:
            raise ValueError("no TFL3 identifier")
        model = r.u32(0)
        buffers = [self._buffer(r, b) for b in r.tables(model, MODEL_BUFFERS)]
        (graph,) = r.tables(model, MODEL_SUBGRAPHS)
        codes = [max(r.scalar(c, OPCODE_OLD, "b"), r.scalar(c, OPCODE_NEW, "i")) for c in r.tables(model, MODEL_OPCODES)]
        self.tensors = tuple(self._tensor(r, t, buffers) for t in r.tables(graph, GRAPH_TENSORS))
        self.operators = tuple(
            Operator(codes[r.scalar(o, OPERATOR_OPCODE, "I")], r.ints(o, OPERATOR_INPUTS), r.ints(o, OPERATOR_OUTPUTS))
            for o in r.tables(graph, GRAPH_OPERATORS)
        )
        self.inputs, self.outputs = r.ints(graph, GRAPH_INPUTS), r.ints(graph, GRAPH_OUTPUTS)
        used = [*self.inputs, *self.outputs, *(i for o in self.operators for i in (*o.inputs, *o.outputs) if i != -1)]
        if any(not 0 <= i < len(self.tensors) for i in used):
            raise IndexError("tensor")
        told = {}
        for entry in r.tables(model, MODEL_METADATA):
            place = buffers[r.scalar(entry, METADATA_BUFFER, "I")]
            told[r.text(entry, METADATA_NAME)] = self.content[place.start : place.start + place.size]
        self.adaptable: dict[str, tuple[tuple[str, int], ...]] = {
            str(k): tuple((str(role), int(i)) for role, i in v) for k, v in json.loads(told.get(ADAPTABLE, b"{}")).items()
        }
        self.packed: dict[str, tuple[int, tuple[int, ...]]] = {
            str(k): (int(i), tuple(int(a) for a in axes)) for k, (i, axes) in json.loads(told.get(PACKED, b"{}")).items()
        }
        for index, axes in self.packed.values():
            if self.tensors[index].kind is not np.int8 or sorted(axes) != list(range(len(axes))):
                raise ValueError(f"tensor {index} has no packed weights")
        for role, index in (carried for all_of in self.adaptable.values() for carried in all_of):
            if not self._carrier(role, index).size:
                raise ValueError(f"tensor {index} has no {role}")

    def _buffer(self, r: _Reader, table: int) -> Place:
        """A buffer's bytes: inside the FlatBuffer, or behind it, as converters lay out files over 2 GB."""
        offset, size = r.scalar(table, BUFFER_OFFSET, "Q"), r.scalar(table, BUFFER_SIZE, "Q")
        if offset > 1:
            if offset + size > len(self.content):
                raise IndexError(offset)
            return Place(offset, size)
        return r.place(table, BUFFER_DATA, 1)

    @staticmethod
    def _tensor(r: _Reader, table: int, buffers: list[Place]) -> Tensor:
        quantised = r.field(table, TENSOR_QUANTISATION)
        scale = zero_point = Place()
        if quantised:
            quantised += r.u32(quantised)
            scale = r.place(quantised, QUANTISATION_SCALE, 4)
            zero_point = r.place(quantised, QUANTISATION_ZERO_POINT, 8)
        return Tensor(
            r.text(table, TENSOR_NAME),
            r.ints(table, TENSOR_SHAPE),
            KINDS.get(r.scalar(table, TENSOR_TYPE, "b")),
            buffers[r.scalar(table, TENSOR_BUFFER, "I")],
            scale,
            zero_point,
        )

    def _carrier(self, role: str, index: int) -> Place:
        if role not in ROLES or index < 0:
            raise ValueError(role)
        place: Place = getattr(self.tensors[index], role)
        return place

    def integer_layers(self) -> list[str]:
        """Names of the weight tensors of every convolution and linear layer that runs on int8 weights and integer codes."""
        layers = [o for o in self.operators if o.builtin in LAYERS and len(o.inputs) > 1]
        pairs = [(self.tensors[o.inputs[0]], self.tensors[o.inputs[1]]) for o in layers]
        return [weight.name for x, weight in pairs if x.kind in (np.int8, np.int16) and weight.kind is np.int8]

    def values(self, name: str) -> NDArray[np.generic]:
        """What the file holds of an adaptable tensor, flat: float32, int32 or uint8 as the norm table has it."""
        role, index = self.adaptable[name][0]
        place, kind = self._carrier(role, index), self.tensors[index].kind
        raw = self.content[place.start : place.start + place.size]
        if role == "zero_point":
            return np.asarray(np.frombuffer(raw, "<i8")[:1] + CODE_OFFSET, np.uint8)
        return np.frombuffer(raw, np.float32 if role == "scale" or kind is None else kind)

    def expanded(self, weights: Mapping[str, NDArray[np.int8]]) -> TfliteFile:
        """The file with its blank weights filled in; itself where it has none.

        Args:
            weights: `refold.bundle.Bundle.packed_weights()`.

        Raises:
            BundleError: a name is missing, or its weights have another shape than the file has room for.
        """
        if not self.packed:
            return self
        copy = bytearray(self.content)
        for name, (index, axes) in self.packed.items():
            tensor, value = self.tensors[index], weights.get(name)
            if value is None or value.ndim != len(axes) or value.transpose(axes).shape != tensor.shape:
                raise BundleError(f"The model and the packed weights disagree about {name}.", code="damaged")
            raw = value.transpose(axes).tobytes()
            if len(raw) != tensor.data.size:
                raise BundleError(f"The model has no room for the weights {name}.", code="damaged")
            copy[tensor.data.start : tensor.data.start + len(raw)] = raw
        return TfliteFile(bytes(copy))

    def patched(self, tensors: Mapping[str, NDArray[np.generic]]) -> bytes:
        """A copy of the file with other values of every adaptable tensor.

        Args:
            tensors: all of `refold.norms.NormTable.tensors(states, activations)`.

        Raises:
            BundleError: a name is missing, or a value has another size than the file has room for.
        """
        copy = bytearray(self.content)
        for name, carriers in self.adaptable.items():
            if name not in tensors:
                raise BundleError(f"The model and its norm table disagree about {name}.", code="damaged")
            value = tensors[name]
            for role, index in carriers:
                place = self._carrier(role, index)
                raw = (value.astype(np.int64) - CODE_OFFSET if role == "zero_point" else value).tobytes()
                if len(raw) != place.size:
                    raise BundleError(f"The model and its norm table disagree about the size of {name}.", code="damaged")
                copy[place.start : place.start + place.size] = raw
        return bytes(copy)


def open_interpreter(content: bytes, threads: int = 1) -> Any:
    """An `ai_edge_litert` Interpreter of the file, its tensors allocated.

    XNNPACK, LiteRT's fast kernels, takes no layer that multiplies a code by 256 or more, as one before a channel that is always
    zero may; then LiteRT's own kernels run the whole file, several times slower but right.

    Raises:
        ValueError, RuntimeError: LiteRT refuses the file.
        ModuleNotFoundError: the `litert` extra is not installed.
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    try:
        fast = Interpreter(model_content=content, num_threads=threads)
        fast.allocate_tensors()
    except (RuntimeError, ValueError) as e:
        plain = Interpreter(
            model_content=content,
            num_threads=threads,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        )
        plain.allocate_tensors()
        log.warning("XNNPACK does not take this model: it runs several times slower. (%s)", str(e).splitlines()[0])
        return plain
    return fast
