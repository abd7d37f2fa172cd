"""Writing a paged bundle as a stream: records one by one, then everything else, then the archive's own list.

    0       zip header of records.bin, its extra field stretched so that it ends at 4,096
    4096    the records
    ...     manifest.pb, signatures, config.json, index.json, resident.safetensors, tokenizer files, central directory

The header's sizes and checksum are filled in last. Until then the file is no zip, so nobody takes half a model for one.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from refold._version import __version__
from refold.atomic import discard, sync_directory
from refold.bundle import FORMAT, MANIFEST, SIGNATURES, member
from refold.codec import table_to_pb
from refold.errors import StorageError, UsageError
from refold.experts.index import ExpertIndex, Geometry, Record
from refold.experts.paged import LOCAL, PagedModel
from refold.experts.records import ALIGNMENT
from refold.experts.tensors import Resident, Tensor, packed
from refold.norms import NormTable
from refold.signing import SigningKey
from refold.v1 import manifest_pb2 as pb
from refold.v1 import norms_pb2

__all__ = ["PagedWriter", "Rest", "write_paged"]

RECORDS = "experts/records.bin"
RESIDENT = "experts/resident.safetensors"
CONFIG = "experts/config.json"
INDEX = "experts/index.json"
TOKENIZER = "experts/tokenizer/"
ALIGN_FIELD = 0xD935  # the extra field by which other tools that align zip members are known
ZIP64_FIELD = 1
DATE = 1 << 5 | 1  # 1 January 1980


@dataclass(frozen=True)
class Rest:
    """All of a paged model but its records.

    Attributes:
        resident: in the order they are to be read. tokenizer: file name to content.
        norms: sites named like their gain in the state dict. measured: what export found, for `refold inspect`.
    """

    name: str
    config: Mapping[str, Any]
    resident: Sequence[Resident]
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)
    bytes_as_tokens: bool = False
    norms: NormTable = field(default_factory=lambda: NormTable(()))
    frequency: Mapping[tuple[int, int], float] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)


class PagedWriter:
    """Grows one file. `begin`, `append` for every expert, `finish`; the caller renames it into place.

    A file whose writing was cut off goes on after `resume`, which reads what is there against the digests it should have.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.records: list[Record] = []
        self._file = file
        self._digest, self._crc, self._size = hashlib.sha256(), 0, 0

    @classmethod
    def begin(cls, path: Path) -> PagedWriter:
        """Raises StorageError: not writable."""
        with _storage(path):
            file = path.open("w+b")
            file.write(bytes(ALIGNMENT))
            return cls(path, file)

    @classmethod
    def resume(cls, path: Path, records: Iterable[Record], progress: Callable[[Record], None] = lambda _: None) -> PagedWriter:
        """Keeps the first of `records` that the file really holds (`.records` says which) and cuts off what follows."""
        if not path.is_file():
            return cls.begin(path)
        with _storage(path):
            writer = cls(path, path.open("r+b"))
            writer._file.seek(0)
            writer._file.write(bytes(ALIGNMENT))
            for record in records:
                content = writer._file.read(record.size) if record.offset == writer._size else b""
                if hashlib.sha256(content).hexdigest() != record.sha256:
                    break
                writer._take(record, content)
                progress(record)
            writer._file.seek(ALIGNMENT + writer._size)
            writer._file.truncate()
            return writer

    def _take(self, record: Record, content: bytes) -> None:
        self._digest.update(content)
        self._crc = zlib.crc32(content, self._crc)
        self._size += len(content)
        self.records.append(record)

    def append(self, layer: int, expert: int, bits: int, content: bytes) -> Record:
        """Adds one record. Raises StorageError: disk full; UsageError: not a multiple of 4,096 bytes."""
        if not content or len(content) % ALIGNMENT:
            raise UsageError(f"A record is a multiple of {ALIGNMENT} bytes, not {len(content)}.")
        record = Record(layer, expert, bits, self._size, len(content), hashlib.sha256(content).hexdigest())
        with _storage(self.path):
            self._file.write(content)
            self._file.flush()
        self._take(record, content)
        return record

    def finish(self, geometry: Geometry, rest: Rest, *keys: SigningKey) -> None:
        """Writes the rest and makes the file a bundle, on the disk for good; the writer is closed.

        Raises:
            StorageError: disk full or failing. UsageError: experts are missing.
        """
        index = ExpertIndex(geometry, {(r.layer, r.expert): r for r in self.records}, rest.frequency)
        ExpertIndex.from_json(index.to_json(), str(self.path))
        with _storage(self.path):
            self._file.seek(ALIGNMENT + self._size)
            self._file.truncate()
            self._write_members(index, rest, keys)
            self._file.seek(0)
            self._file.write(_local_header(RECORDS, self._size, self._crc))
            self._file.flush()
            os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        """What `finish` has not put on the disk is given up: an error of the disk has been said where it arose."""
        with suppress(OSError):
            self._file.close()

    @contextmanager
    def closed_on_error(self) -> Iterator[PagedWriter]:
        """What the writer is used in: whatever goes wrong there, the file is closed, and left as it is."""
        try:
            yield self
        except BaseException:
            self.close()
            raise

    def _write_members(self, index: ExpertIndex, rest: Rest, keys: Sequence[SigningKey]) -> None:
        small = {CONFIG: json.dumps(dict(rest.config), indent=1, sort_keys=True).encode(), INDEX: index.to_json()}
        small |= {TOKENIZER + name: content for name, content in rest.tokenizer.items()}
        parts = {name: (len(c), hashlib.sha256(c).hexdigest()) for name, c in small.items()}
        parts[RECORDS] = (self._size, self._digest.hexdigest())
        with zipfile.ZipFile(self._file, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            info = member(RECORDS, zipfile.ZIP_STORED)
            info.header_offset, info.CRC, info.file_size, info.compress_size = 0, self._crc, self._size, self._size
            info.create_version = info.extract_version = zipfile.ZIP64_VERSION
            archive.filelist.append(info)
            archive.NameToInfo[RECORDS] = info
            parts[RESIDENT] = _stored(archive, RESIDENT, packed(rest.resident))
            for name, content in sorted(small.items()):
                archive.writestr(member(name), content)
            content = self._manifest(index, rest, parts).SerializeToString(deterministic=True)
            archive.writestr(member(MANIFEST), content)
            if keys:
                signed = norms_pb2.SignedRelease(signatures=[k.sign(content) for k in keys])
                archive.writestr(member(SIGNATURES), signed.SerializeToString(deterministic=True))

    def _manifest(self, index: ExpertIndex, rest: Rest, parts: Mapping[str, tuple[int, str]]) -> pb.Manifest:
        g = index.geometry
        manifest = pb.Manifest(format=FORMAT, name=rest.name, made_by=f"refold {__version__}")
        manifest.norms.CopyFrom(table_to_pb(rest.norms))
        manifest.experts.CopyFrom(
            pb.Experts(
                family=g.family, config=CONFIG, resident=RESIDENT, records=RECORDS, index=INDEX,
                tokenizer=sorted(TOKENIZER + name for name in rest.tokenizer), bytes_as_tokens=rest.bytes_as_tokens,
                layers=len(g.layers), experts=g.experts, top_k=g.top_k,
                record_bytes=self._size, resident_bytes=sum(t.size for t in rest.resident),
                bits=Counter(r.bits for r in self.records), measured=dict(rest.measured),
            )
        )  # fmt: skip
        for name, (size, sha256) in sorted(parts.items()):
            manifest.parts.add(path=name, size=size, sha256=sha256)
        return manifest


def _stored(archive: zipfile.ZipFile, name: str, chunks: Iterable[bytes]) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with archive.open(member(name, zipfile.ZIP_STORED), "w", force_zip64=True) as f:
        for chunk in chunks:
            f.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _local_header(name: str, size: int, crc: int) -> bytes:
    """A stored zip64 member's header of exactly ALIGNMENT bytes."""
    zip64 = struct.pack("<HHQQ", ZIP64_FIELD, 16, size, size)
    room = ALIGNMENT - LOCAL.size - len(name) - len(zip64) - 4
    extra = zip64 + struct.pack("<HH", ALIGN_FIELD, room) + struct.pack("<H", ALIGNMENT).ljust(room, b"\0")
    fixed = (b"PK\x03\x04", zipfile.ZIP64_VERSION, 0, zipfile.ZIP_STORED, 0, DATE, crc, 0xFFFFFFFF, 0xFFFFFFFF)
    return LOCAL.pack(*fixed, len(name), len(extra)) + name.encode() + extra


class _storage:  # noqa: N801  a with-statement that reads as a word
    """OSErrors become one sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, io.UnsupportedOperation):
            raise StorageError(
                f"{self.path} cannot be written: {error.strerror or error}. Free some space or check the disk."
            ) from error


def write_paged(
    path: str | os.PathLike[str],
    geometry: Geometry,
    records: Iterable[tuple[int, int, int, bytes]],
    config: Mapping[str, Any],
    resident: Mapping[str, NDArray[np.generic] | Tensor] | Sequence[Resident],
    *keys: SigningKey,
    **rest: Any,
) -> PagedModel:
    """Writes a paged bundle in one step: a temporary file beside it, fsynced, renamed.

    Args:
        records: (layer, expert, bits, record) of every expert, in the order they are to lie in.
        resident: by name, as arrays (or as `Tensor`s, for bfloat16), or as tensors that are read when their turn comes.
        rest: as in `Rest`: name, tokenizer, bytes_as_tokens, norms, frequency, measured.

    Raises:
        StorageError: disk full or not writable; nothing is left behind. UsageError: experts are missing.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if isinstance(resident, Mapping):
        tensors = {n: t if isinstance(t, Tensor) else Tensor.of(np.asarray(t)) for n, t in resident.items()}
        resident = [Resident.of(n, t) for n, t in tensors.items()]
    rest.setdefault("name", path.stem)
    try:
        writer = PagedWriter.begin(temporary)
        try:
            for layer, expert, bits, content in records:
                writer.append(layer, expert, bits, content)
            writer.finish(geometry, Rest(config=config, resident=resident, **rest), *keys)
        finally:
            writer.close()
        with _storage(path):
            temporary.replace(path)
            sync_directory(path.parent)
    except BaseException:
        discard(temporary)
        raise
    return PagedModel.open(path)
