"""Weight codes of 2 to 6 bits as a stream of bits: how a bundle keeps them and how they travel.

A runtime's convolutions take int8 codes; they are expanded when an engine is built. Of 7 and 8 bits nothing would be saved.

    unsigned value  u[c] = code[c] + offset[c]        0 ≤ u < 2**bits, offset[c] = −(least code of channel c)
    stream          value after value, channel by channel, least significant bit first
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from refold.errors import BundleError
from refold.limits import LIMITS
from refold.v1 import manifest_pb2 as pb

__all__ = ["MOST_BITS", "PackedCodes", "pack", "packed_size", "unpack", "weights_from_bytes", "weights_to_bytes"]

MOST_BITS = 6
AT_ONCE = 1 << 18  # codes; a multiple of 8, so that every piece of the stream ends with a byte


@dataclass(frozen=True)
class PackedCodes:
    """int8 codes (channels, ...) in `bits` bits each.

    Attributes:
        offset: one for each channel, or one for all.
    """

    shape: tuple[int, ...]
    bits: int
    offset: tuple[int, ...]
    data: bytes


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes take in a bundle."""
    return -(-count * bits // 8) if bits <= MOST_BITS else count


def pack(codes: NDArray[np.int8], bits: int) -> PackedCodes:
    """Args:
        codes: int8 (channels, ...); those of one channel lie within 2**bits − 1 of each other.

    Raises:
        ValueError: bits outside 2..6, or codes of a channel too far apart.
    """  # fmt: skip
    if not 2 <= bits <= MOST_BITS:
        raise ValueError(f"codes are packed in 2 to {MOST_BITS} bits, not {bits}")
    rows = codes.reshape(codes.shape[0], -1).astype(np.int16)
    low = rows.min(1, initial=0) if rows.size else np.zeros(len(rows), np.int16)
    narrow = 2 ** (bits - 1)
    if rows.size and rows.min() >= -narrow and rows.max() < narrow:
        low = np.full(1, -narrow, np.int16)
    unsigned = rows - low[:, None]
    if unsigned.size and unsigned.max() >= 2**bits:
        raise ValueError(f"codes of one channel span {int(unsigned.max()) + 1} values, more than {bits} bits hold")
    flat = unsigned.reshape(-1).astype(np.uint8)
    places = np.arange(bits, dtype=np.uint8)
    parts = [
        np.packbits(flat[i : i + AT_ONCE, None] >> places & 1, bitorder="little").tobytes()
        for i in range(0, len(flat), AT_ONCE)
    ]
    return PackedCodes(codes.shape, bits, tuple(int(-v) for v in low), b"".join(parts))


def unpack(packed: PackedCodes) -> NDArray[np.int8]:
    """The codes again, int8 of `packed.shape`.

    Raises:
        BundleError: shape, bits, offsets and bytes do not belong together.
    """
    count = int(np.prod(packed.shape, dtype=np.int64)) if packed.shape else 0
    fits = (
        0 < count <= LIMITS.bundle_bytes
        and 2 <= packed.bits <= MOST_BITS
        and len(packed.offset) in (1, packed.shape[0])
        and all(0 <= o <= 128 for o in packed.offset)
        and len(packed.data) == packed_size(count, packed.bits)
    )
    if not fits:
        raise BundleError("Packed weights have another length than they announce: the bundle is damaged.", code="damaged")
    stream = np.frombuffer(packed.data, np.uint8)
    out = np.empty(count, np.int16)
    places = (1 << np.arange(packed.bits)).astype(np.int16)
    for i in range(0, count, AT_ONCE):
        some = min(AT_ONCE, count - i)
        first = i * packed.bits // 8
        bits = np.unpackbits(stream[first : first + -(-some * packed.bits // 8)], count=some * packed.bits, bitorder="little")
        out[i : i + some] = bits.reshape(some, packed.bits) @ places
    rows = out.reshape(packed.shape[0], -1) - np.asarray(packed.offset, np.int16)[:, None]
    if rows.min() < -128 or rows.max() > 127:
        raise BundleError("Packed weights leave the range of int8: the bundle is damaged.", code="damaged")
    return rows.astype(np.int8).reshape(packed.shape)


def weights_to_bytes(weights: dict[str, PackedCodes]) -> bytes:
    """The bundle's part: all packed tensors by the name they have in the target models."""
    message = pb.PackedWeights()
    for name, w in weights.items():
        message.tensors.add(name=name, shape=w.shape, bits=w.bits, offset=w.offset, data=w.data)
    return message.SerializeToString(deterministic=True)


def weights_from_bytes(content: bytes) -> dict[str, PackedCodes]:
    """Raises BundleError when the bytes are no packed weights, or name a tensor twice."""
    try:
        message = pb.PackedWeights.FromString(content)
    except DecodeError as e:
        raise BundleError("The packed weights cannot be read: the bundle is damaged.", code="damaged") from e
    found = {t.name: PackedCodes(tuple(t.shape), t.bits, tuple(t.offset), t.data) for t in message.tensors}
    if len(found) != len(message.tensors):
        raise BundleError("The packed weights name a tensor twice: the bundle is damaged.", code="damaged")
    return found
