"""Expert records: what `export/experts` writes and `edge/experts` reads, in numpy alone.

    records.py   one expert as one contiguous block of a file: header, scales, packed codes
    index.py     where each expert lies, how many bits it has, and the digest of its record

Inside a bundle (a `.refold` zip whose `records.bin` is stored, not compressed, and begins on a multiple of 4,096 bytes, so that
a device reads a record straight from the bundle with O_DIRECT):

    experts/config.json            the checkpoint's own Hugging Face configuration
    experts/resident.safetensors   every tensor that is not an expert's, by the names of transformers' state dict
    experts/records.bin            the records, layer by layer
    experts/index.json             this folder's ExpertIndex
    experts/tokenizer/...          the checkpoint's tokenizer files, where it has some
"""

from __future__ import annotations

from refold.experts.index import ExpertIndex, Geometry, Record
from refold.experts.records import ALIGNMENT, BITS, Matrix, decode, dequantise, encode, quantise, record_bytes

__all__ = [
    "ALIGNMENT",
    "BITS",
    "ExpertIndex",
    "Geometry",
    "Matrix",
    "Record",
    "decode",
    "dequantise",
    "encode",
    "quantise",
    "record_bytes",
]
