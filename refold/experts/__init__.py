"""Expert records: what `export/experts` writes and `edge/experts` reads, in numpy alone.

    records.py   one expert as one contiguous block of a file: header, scales, packed codes
    index.py     where each expert lies, how many bits it has, and the digest of its record
    tensors.py   safetensors, one tensor at a time: the resident part
    paged.py     a paged bundle opened for reading
    interface.py what transformers' experts modules say of their arithmetic, against what a record can hold
    generation.py  generation_config.json: what a device honours of it
    write.py     ... and written as a stream

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
from refold.experts.paged import PagedModel
from refold.experts.records import ALIGNMENT, BITS, Matrix, decode, dequantise, encode, quantise, record_bytes
from refold.experts.tensors import Resident, Tensor
from refold.experts.write import PagedWriter, Rest, write_paged

__all__ = [
    "ALIGNMENT",
    "BITS",
    "ExpertIndex",
    "Geometry",
    "Matrix",
    "PagedModel",
    "PagedWriter",
    "Record",
    "Resident",
    "Rest",
    "Tensor",
    "decode",
    "dequantise",
    "encode",
    "quantise",
    "record_bytes",
    "write_paged",
]
