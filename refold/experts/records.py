"""One expert as bytes: a header of 64, then for each of its matrices the scales and the packed codes.

A matrix W of shape (rows, columns) is cut into groups of `group` neighbours along a row, each with one float16 scale:

    w = (code - centre) * scale      8 bits: code int8, centre 0;  4 bits: code 0..15, centre 8;  2 bits: code 0..3, centre 1.5

Two bits have no zero: four levels at -1.5, -0.5, 0.5 and 1.5 scales lose less than three at -1, 0 and 1.

Codes are packed in blocks of 32 along a row, planar, so that one 16- or 32-byte register and shifts unpack a block:

    8 bits   byte i = code i
    4 bits   byte i = code i | code (i + 16) << 4                                        i < 16
    2 bits   byte i = code i | code (i + 8) << 2 | code (i + 16) << 4 | code (i + 24) << 6    i < 8

Columns are padded with zeros to a multiple of the group; a reader pads its input to match. Every part begins on a multiple of
64 bytes, every record on one of 4,096 (what O_DIRECT asks of offsets, lengths and buffers).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refold.errors import BundleError, UsageError

__all__ = [
    "ALIGNMENT",
    "BITS",
    "BLOCK",
    "CENTRE",
    "Matrix",
    "decode",
    "dequantise",
    "encode",
    "padded",
    "quantise",
    "record_bytes",
]

ALIGNMENT = 4096
BITS = (2, 4, 8)
BLOCK = 32
CENTRE = {8: 0.0, 4: 8.0, 2: 1.5}
MAGIC = b"RFX1"
HEADER = struct.Struct("<4shHBBHIII")  # magic, layer, expert, bits, matrices, group, bytes used, 0, 0
PART = 64
STEPS = np.linspace(0.7, 1.0, 16, dtype=np.float32)  # of the largest weight, tried as ends of a group's range

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Matrix:
    """One quantised weight matrix.

    Attributes:
        shape: (rows, columns) before padding.
        bits: 2, 4 or 8. group: neighbours along a row that share a scale; a multiple of 32.
        scales: float16 (rows, padded columns / group).
        codes: uint8 (rows, padded columns * bits / 8), packed.
    """

    shape: tuple[int, int]
    bits: int
    group: int
    scales: NDArray[np.float16]
    codes: U8


def padded(columns: int, group: int) -> int:
    """Columns with the zeros that fill the last group."""
    return -(-columns // group) * group


def quantise(weight: F32, bits: int, group: int = 64) -> Matrix:
    """Group-wise, with the scale of least squared error among sixteen for 2 and 4 bits and the largest weight's for 8.

    Args:
        weight: float32 (rows, columns).

    Raises:
        UsageError: other bits than 2, 4 or 8, a group that is no multiple of 32, or a weight that is not finite.
    """
    _check(bits, group)
    weight = np.asarray(weight, np.float32)
    if weight.ndim != 2 or not np.isfinite(weight).all():
        raise UsageError(
            f"An expert's matrix is two-dimensional and finite, not of shape {weight.shape} or with infinite numbers."
        )
    rows, columns = weight.shape
    wide = np.zeros((rows, padded(columns, group)), np.float32)
    wide[:, :columns] = weight
    w = wide.reshape(rows, -1, group)
    most = np.abs(w).max(2)
    reach = {8: 127.0, 4: 7.5, 2: 1.5}[bits]
    if bits == 8:
        scales = np.maximum(most / reach, 0).astype(np.float16)
    else:
        best, scales = np.full(most.shape, np.inf, np.float32), np.zeros(most.shape, np.float16)
        for step in STEPS:
            tried = (most * step / reach).astype(np.float16)
            error = np.square(_codes(w, tried, bits) * tried.astype(np.float32)[..., None] - w).sum(2)
            better = error < best
            best, scales = np.where(better, error, best), np.where(better, tried, scales).astype(np.float16)
    codes = (_codes(w, scales, bits) + CENTRE[bits]).reshape(rows, -1)
    return Matrix((rows, columns), bits, group, scales, _pack(codes, bits))


def _codes(w: F32, scales: NDArray[np.float16], bits: int) -> F32:
    """Nearest levels in units of the scale, float32 like `w` (rows, groups, group): code - centre."""
    s = scales.astype(np.float32)[..., None]
    x = np.divide(w, s, out=np.zeros_like(w), where=s > 0)
    if bits == 2:
        return np.asarray(np.clip(np.floor(x), -2, 1) + 0.5, np.float32)
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    return np.asarray(np.clip(np.rint(x), low, high), np.float32)


def _pack(codes: F32, bits: int) -> U8:
    if bits == 8:
        return codes.astype(np.int8).view(np.uint8)
    per = 8 // bits
    blocks = codes.astype(np.uint8).reshape(len(codes), -1, per, BLOCK // per)
    shifts = (np.arange(per, dtype=np.uint8) * np.uint8(bits))[:, None]
    return np.ascontiguousarray(np.bitwise_or.reduce(blocks << shifts, axis=2).reshape(len(codes), -1))


def _unpack(codes: U8, bits: int) -> F32:
    """code - centre, float32 (rows, padded columns)."""
    if bits == 8:
        return codes.view(np.int8).astype(np.float32)
    per = 8 // bits
    blocks = codes.reshape(len(codes), -1, 1, BLOCK // per)
    shifts = (np.arange(per, dtype=np.uint8) * np.uint8(bits))[:, None]
    out = (blocks >> shifts) & np.uint8((1 << bits) - 1)
    return np.asarray(out.reshape(len(codes), -1).astype(np.float32) - np.float32(CENTRE[bits]), np.float32)


def dequantise(matrix: Matrix) -> F32:
    """float32 (rows, columns): the exact weights that the codes mean; the oracle of every kernel."""
    rows, columns = matrix.shape
    levels = _unpack(matrix.codes, matrix.bits).reshape(rows, -1, matrix.group)
    return np.ascontiguousarray((levels * matrix.scales.astype(np.float32)[..., None]).reshape(rows, -1)[:, :columns])


def _sizes(shape: tuple[int, int], bits: int, group: int) -> tuple[int, int]:
    wide = padded(shape[1], group)
    return shape[0] * (wide // group) * 2, shape[0] * wide * bits // 8


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def record_bytes(shapes: Sequence[tuple[int, int]], bits: int, group: int) -> int:
    """Length of the record of an expert with such matrices, padding included."""
    parts = [size for shape in shapes for size in _sizes(shape, bits, group)]
    return _up(PART + sum(_up(p, PART) for p in parts), ALIGNMENT)


def encode(layer: int, expert: int, matrices: Sequence[Matrix]) -> bytes:
    """The record, a multiple of 4,096 bytes. All matrices have the same bits and group."""
    bits, group = matrices[0].bits, matrices[0].group
    if any((m.bits, m.group) != (bits, group) for m in matrices):
        raise UsageError("The matrices of one expert have one bit-width and one group.")
    total = record_bytes([m.shape for m in matrices], bits, group)
    out = bytearray(total)
    at = PART
    for matrix in matrices:
        for part in (matrix.scales.tobytes(), matrix.codes.tobytes()):
            out[at : at + len(part)] = part
            at += _up(len(part), PART)
    HEADER.pack_into(out, 0, MAGIC, layer, expert, bits, len(matrices), group, at, 0, 0)
    return bytes(out)


def decode(
    record: bytes | bytearray | memoryview | U8, shapes: Sequence[tuple[int, int]], layer: int, expert: int
) -> tuple[Matrix, ...]:
    """Views into the record, without a copy: what a cache of packed records is computed from.

    Raises:
        BundleError: the bytes are not the record of this expert, or are too few.
    """
    what = f"expert {expert} of layer {layer}"
    raw = np.frombuffer(record, np.uint8)
    if len(raw) < PART:
        raise BundleError(
            f"The record of expert {expert} of layer {layer} is truncated: export the model again.", code="damaged"
        )
    magic, its_layer, its_expert, bits, count, group, used, _, _ = HEADER.unpack(raw[: HEADER.size].tobytes())
    if (magic, its_layer, its_expert, count) != (MAGIC, layer, expert, len(shapes)) or bits not in BITS:
        raise BundleError(
            f"What was read for {what} is another record or damaged: copy or export the model again.",
            code="damaged",
        )
    _check(bits, group)
    if used > len(raw) or record_bytes(shapes, bits, group) > len(raw):
        raise BundleError(
            f"The record of expert {expert} of layer {layer} is truncated: export the model again.", code="damaged"
        )
    out, at = [], PART
    for shape in shapes:
        scales, codes = _sizes(shape, bits, group)
        s = raw[at : at + scales].view(np.float16).reshape(shape[0], -1)
        at += _up(scales, PART)
        out.append(Matrix(shape, bits, group, s, raw[at : at + codes].reshape(shape[0], -1)))
        at += _up(codes, PART)
    return tuple(out)


def _check(bits: int, group: int) -> None:
    if bits not in BITS:
        raise UsageError(f"Experts have 2, 4 or 8 bits, not {bits}.")
    if group < BLOCK or group % BLOCK:
        raise UsageError(f"A group is a multiple of {BLOCK} neighbours, not {group}.")
