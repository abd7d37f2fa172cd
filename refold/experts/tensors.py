"""The safetensors format, one tensor at a time: 8 bytes with the header's length, the header as JSON, then the data.

A device reads and a workstation writes it without the library: neither needs more than this, and no tensor is held twice.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refold.errors import BundleError

__all__ = ["DTYPES", "Resident", "Tensor", "header_of", "packed", "parse_header"]

DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
NAMES = {np.dtype(v): k for k, v in NUMPY.items()}
HEADER_LIMIT = 100 << 20  # the library's own


class Tensor(NamedTuple):
    """dtype: as safetensors names it, as in "F32" or "BF16". data: little-endian, row after row."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def numpy(self) -> NDArray[Any]:
        """The same numbers; bfloat16, which numpy lacks, as float32."""
        if self.dtype == "BF16":
            wide = np.frombuffer(self.data, "<u2").astype(np.uint32) << np.uint32(16)
            return np.asarray(wide.view(np.float32).reshape(self.shape))
        return np.frombuffer(self.data, NUMPY[self.dtype]).reshape(self.shape)

    @classmethod
    def of(cls, array: NDArray[Any]) -> Tensor:
        return cls(NAMES[array.dtype.newbyteorder("=")], tuple(array.shape), np.ascontiguousarray(array).tobytes())


@dataclass(frozen=True)
class Resident:
    """A tensor that is read when it is written: name, dtype and shape are known before, `read` gives its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], bytes]

    @property
    def size(self) -> int:
        return DTYPES[self.dtype] * math.prod(self.shape)

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Resident:
        return cls(name, tensor.dtype, tensor.shape, lambda: tensor.data)


class Place(NamedTuple):
    """Where a tensor lies. start: bytes from the begin of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def header_of(tensors: Sequence[Resident]) -> bytes:
    """The file up to its data, for tensors in this order; padded with spaces to a multiple of 64."""
    entries: dict[str, Any] = {}
    at = 0
    for t in tensors:
        entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.size]}
        at += t.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text


def packed(tensors: Sequence[Resident]) -> Iterator[bytes]:
    """A whole safetensors file, tensor after tensor."""
    yield header_of(tensors)
    for t in tensors:
        data = t.read()
        if len(data) != t.size:
            raise BundleError(f"{t.name} has {len(data)} bytes where {t.size} were announced.", code="damaged")
        yield data


def parse_header(read: Callable[[int, int], bytes], size: int, what: str) -> dict[str, Place]:
    """Where each tensor of a file lies, in the order of the data.

    Args:
        read: (offset, length) -> bytes of the file. size: of the file.

    Raises:
        BundleError: not safetensors, or truncated.
    """
    damaged = BundleError(f"{what} is truncated or not a safetensors file: copy or download it again.", code="damaged")
    first = read(0, 8) if size >= 8 else b""
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
    if not 0 <= length <= min(HEADER_LIMIT, size - 8):
        raise damaged
    try:
        told: Mapping[str, Any] = json.loads(read(8, length))
        places: dict[str, Place] = {}
        for name, entry in told.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
            if min(shape, default=0) < 0 or not 0 <= start <= end or 8 + length + end > size:
                raise damaged
            if dtype in DTYPES and DTYPES[dtype] * math.prod(shape) != end - start:
                raise damaged
            places[name] = Place(dtype, shape, 8 + length + start, end - start)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise damaged from e
    return dict(sorted(places.items(), key=lambda item: item[1].start))
