"""A paged language model opened for reading, on numpy alone: what a device and its tools see of `m.refold`.

Nothing of `records.bin` is read by opening. A reader adds `records_at` to a record's offset and reads from the bundle itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refold.bundle import CHUNK, Bundle, Progress, silent
from refold.errors import BundleError
from refold.experts.generation import FILE as GENERATION
from refold.experts.index import ExpertIndex, Record
from refold.experts.records import ALIGNMENT
from refold.experts.tensors import Place, Tensor, parse_header
from refold.signing import KeyRing

__all__ = ["PagedModel"]

LOCAL = struct.Struct("<4s5H3I2H")  # a zip member's own header; the last two are the lengths of its name and its extra field


class PagedModel:
    """A `.refold` file that holds a mixture-of-experts language model.

    Attributes:
        path: the file.
        bundle: the same file as a Bundle: digest, norm table, signatures, other parts.
        index: where each expert's record lies.
        config: the checkpoint's Hugging Face configuration.
        records_at: where records.bin begins in the file; a multiple of 4,096 bytes.
    """

    def __init__(self, bundle: Bundle, index: ExpertIndex, config: dict[str, Any], records_at: int, resident_at: int) -> None:
        self.bundle, self.index, self.config, self.records_at = bundle, index, config, records_at
        self.path = bundle.path
        self._resident_at = resident_at

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> PagedModel:
        """Raises BundleError: as Bundle.open, not a paged language model, or its index does not fit its records."""
        return cls.of(Bundle.open(path))

    @classmethod
    def of(cls, bundle: Bundle) -> PagedModel:
        if not bundle.paged:
            raise BundleError(
                f"{bundle.path} holds pictures' models, not a paged language model: make one with `refold export experts`.",
                code="not-paged",
            )
        told = bundle.manifest.experts
        index = ExpertIndex.from_json(bundle.read(told.index), str(bundle.path))
        try:
            config = json.loads(bundle.read(told.config))
            assert isinstance(config, dict)
        except (ValueError, AssertionError) as e:
            raise BundleError(f"The configuration in {bundle.path} is damaged: export it again.", code="damaged") from e
        sizes = {p.path: p.size for p in bundle.parts}
        if max(r.offset + r.size for r in index) != sizes.get(told.records):
            raise BundleError(f"The records of {bundle.path} are not those of its index: export it again.", code="damaged")
        at = _starts(bundle, (told.records, told.resident))
        if at[0] % ALIGNMENT:
            raise BundleError(f"The records of {bundle.path} are not aligned: export it again.", code="damaged")
        return cls(bundle, index, config, at[0], at[1])

    def _place_of_resident(self) -> tuple[int, int]:
        name = self.bundle.manifest.experts.resident
        return self._resident_at, next(p.size for p in self.bundle.parts if p.path == name)

    def resident_places(self) -> dict[str, Place]:
        """Name to (dtype, shape, start, size) of every resident tensor; starts count from the begin of the bundle."""
        at, size = self._place_of_resident()
        with self.path.open("rb") as f:
            places = parse_header(
                lambda start, n: os.pread(f.fileno(), n, at + start), size, f"The resident part of {self.path}"
            )
        return {name: p._replace(start=p.start + at) for name, p in places.items()}

    def resident_tensors(self, progress: Progress = silent) -> Iterator[tuple[str, Tensor]]:
        """(name, (dtype, shape, bytes)) one after the other: memory for the largest only. Their names are those of the state
        dict of transformers' model. `Tensor.numpy()` makes an array.

        The digest of the whole part is checked while its tensors pass, so a change shows at the latest after the last one.

        Raises:
            BundleError: damaged.
        """
        told = self.bundle.manifest.experts
        wanted = next(p.sha256 for p in self.bundle.parts if p.path == told.resident)
        at, size = self._place_of_resident()
        places = self.resident_places()
        digest, done = hashlib.sha256(), at
        with self.path.open("rb") as f:
            for name, place in places.items():
                digest.update(_exactly(f.fileno(), done, place.start - done, self.path))  # the header
                data = _exactly(f.fileno(), place.start, place.size, self.path)
                digest.update(data)
                done = place.start + place.size
                progress(place.size)
                yield name, Tensor(place.dtype, place.shape, data)
            digest.update(_exactly(f.fileno(), done, at + size - done, self.path))
        if digest.hexdigest() != wanted:
            raise BundleError(f"{told.resident} in {self.path} does not match its digest: the file was changed.", code="digest")

    def tokenizer_files(self) -> dict[str, bytes]:
        """File name to content of the checkpoint's tokenizer; empty where a token is a byte."""
        return {Path(p).name: self.bundle.read(p) for p in self.bundle.manifest.experts.tokenizer if Path(p).name != GENERATION}

    def generation_config(self) -> dict[str, Any] | None:
        """The checkpoint's generation_config.json; None where it had none. Raises BundleError: no JSON object."""
        path = next((p for p in self.bundle.manifest.experts.tokenizer if Path(p).name == GENERATION), None)
        if path is None:
            return None
        try:
            told = json.loads(self.bundle.read(path))
            assert isinstance(told, dict)
        except (ValueError, AssertionError) as e:
            raise BundleError(f"{GENERATION} in {self.path} is damaged: export it again.", code="damaged") from e
        return told

    @property
    def bytes_as_tokens(self) -> bool:
        """Text is its own UTF-8 and a token is a byte: `list(text.encode())`."""
        return self.bundle.manifest.experts.bytes_as_tokens

    def read_record(self, layer: int, expert: int) -> bytes:
        """One record, checked; a device reads through its pager. Raises BundleError: damaged, saying which expert."""
        record = self.index[layer, expert]
        with self.path.open("rb") as f:
            content = _exactly(f.fileno(), self.records_at + record.offset, record.size, self.path)
        self.check(record, hashlib.sha256(content).hexdigest())
        return content

    def check(self, record: Record, sha256: str) -> None:
        """Raises BundleError when the digest of what was read is not the record's."""
        if sha256 != record.sha256:
            raise BundleError(
                f"Expert {record.expert} of layer {record.layer} in {self.path} does not match its digest: "
                "copy the bundle again.",
                code="digest",
            )

    def verify(self, ring: KeyRing | None = None, progress: Progress = silent) -> None:
        """As Bundle.verify; the records are read once, against their own digests and the part's.

        Raises:
            BundleError: damaged; for a record, which expert's. SignatureError: not signed by enough trusted keys.
        """
        if ring is not None:
            self.bundle.check_signatures(ring)
        told = self.bundle.manifest.experts
        for part in self.bundle.parts:
            if part.path != told.records:
                for chunk in self.bundle.chunks(part.path):
                    progress(len(chunk))
                continue
            whole, done = hashlib.sha256(), 0
            with self.path.open("rb") as f:
                for record in sorted(self.index, key=lambda r: r.offset):
                    whole.update(_exactly(f.fileno(), self.records_at + done, record.offset - done, self.path))
                    own = hashlib.sha256()
                    for start in range(record.offset, record.offset + record.size, CHUNK):
                        wanted = min(CHUNK, record.offset + record.size - start)
                        content = _exactly(f.fileno(), self.records_at + start, wanted, self.path)
                        own.update(content)
                        whole.update(content)
                        progress(wanted)
                    self.check(record, own.hexdigest())
                    done = record.offset + record.size
            if whole.hexdigest() != part.sha256:
                raise BundleError(f"{part.path} in {self.path} does not match its digest: the file was changed.", code="digest")


def _exactly(descriptor: int, start: int, length: int, path: Path) -> bytes:
    pieces, left = [], length
    while left:
        try:
            piece = os.pread(descriptor, min(left, 1 << 30), start + length - left)
        except OSError as e:
            raise BundleError(f"{path} cannot be read: {e.strerror or e}.", code="unreadable") from e
        if not piece:
            raise BundleError(f"{path} is truncated: copy or export it again.", code="damaged")
        pieces.append(piece)
        left -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _starts(bundle: Bundle, names: tuple[str, ...]) -> list[int]:
    """Where the data of stored members begin in the file."""
    out = []
    try:
        with zipfile.ZipFile(bundle.path) as archive, bundle.path.open("rb") as f:
            for name in names:
                info = archive.getinfo(name)
                local = LOCAL.unpack(_exactly(f.fileno(), info.header_offset, LOCAL.size, bundle.path))
                if local[0] != b"PK\x03\x04":
                    raise BundleError(f"{name} in {bundle.path} has a damaged header: copy it again.", code="damaged")
                out.append(info.header_offset + LOCAL.size + local[-2] + local[-1])
                if out[-1] + info.file_size > bundle.size:
                    raise BundleError(f"{bundle.path} is truncated: copy or export it again.", code="damaged")
    except (zipfile.BadZipFile, KeyError, OSError) as e:
        raise BundleError(f"{bundle.path} is damaged: copy or export it again.", code="damaged") from e
    return out
