"""One `.refold` file: a zip whose `manifest.pb` lists every other member with its size and SHA-256.

    targets/<name>/model.onnx   the integer model: adaptable tensors are external initialisers (not in the file)
    targets/<name>/taps.onnx    same integers; outputs each norm's input moments
    targets/litert/*.tflite     the same two for LiteRT: adaptable tensors are in the file and patched in a copy
    targets/tensorrt/build.json how a device builds an engine of these, and which of its weights are norms
    statistics.onnx             measures and applies every norm's statistics in one pass over kept images; serves all targets
    class_moments.npz           how those statistics depend on the class mix
    weights.packed              integers of 2 to 6 bits, one copy for all targets, which then do not hold them
    student.pt2                 the exported program the cloud trains
    calibration.npz             the slice kept for release gates
    manifest.pb                 everything else: norm table, preprocessing, layers, digests
    manifest.sig                optional: a SignedRelease-style list of signatures over manifest.pb

A paged language model has `experts/...` instead (refold/experts): its two large members are stored, not compressed, and only
its manifest's message `experts` lifts the limit on the file's size.

The bundle's digest is the SHA-256 of manifest.pb, which covers every member through its digest. Members are stored in a
fixed order with fixed dates, so the same content is the same file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from refold.atomic import discard, make_directory, sync_directory, write_atomically
from refold.codec import table_from_pb
from refold.errors import BundleError, NormStateError, StorageError, UsageError
from refold.limits import LIMITS
from refold.norms import NormTable
from refold.packing import unpack, weights_from_bytes
from refold.preprocess import Preprocess
from refold.signing import KeyRing, SigningKey
from refold.v1 import manifest_pb2 as pb
from refold.v1 import norms_pb2

__all__ = ["FORMAT", "Bundle", "write_bundle"]

FORMAT = 1
MANIFEST = "manifest.pb"
SIGNATURES = "manifest.sig"
CHUNK = 1 << 20
Progress = Callable[[int], None]  # bytes done since the last call


def silent(_: int) -> None:
    return None


class Bundle:
    """A bundle opened for reading. Opening checks the archive and the manifest; reading a part checks its digest.

    Attributes:
        path: the file.
        manifest: the decoded manifest.
        digest: lower-case hex SHA-256 of the manifest bytes; the bundle's identity everywhere.
    """

    def __init__(self, path: Path, manifest: pb.Manifest, manifest_bytes: bytes, signatures: bytes) -> None:
        self.path = path
        self.manifest = manifest
        self.digest = hashlib.sha256(manifest_bytes).hexdigest()
        self._manifest_bytes = manifest_bytes
        self._signatures = signatures
        self._parts = {p.path: p for p in manifest.parts}
        try:
            self.norms: NormTable = table_from_pb(manifest.norms)
            self._preprocess = None if self.paged else Preprocess.from_pb(manifest.preprocess)
        except (NormStateError, UsageError) as e:
            raise BundleError(f"The manifest of {path} is damaged: {e.message}", code="damaged") from e

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Raises BundleError: missing, truncated, oversized, not a bundle, inconsistent, or of a newer format."""
        path = Path(path)
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise BundleError(f"{path} cannot be read: it is no regular file.", code="unreadable")
            size = found.st_size
            if size > LIMITS.paged_bytes:
                raise BundleError(f"{path} has {size} bytes; the limit is {LIMITS.paged_bytes}.", code="bundle-too-large")
            with zipfile.ZipFile(path) as archive:
                members = _members(path, archive)
                manifest_bytes = _read_small(archive, members, MANIFEST, path) if MANIFEST in members else b""
                _check_sizes(path, size, members, _manifest(manifest_bytes, path))
                if MANIFEST not in members:
                    raise BundleError(f"{path} has no {MANIFEST}: it is not a Refold bundle.", code="damaged")
                signatures = _read_small(archive, members, SIGNATURES, path) if SIGNATURES in members else b""
        except FileNotFoundError:
            raise BundleError(f"There is no bundle at {path}.", code="no-bundle") from None
        except (zipfile.BadZipFile, EOFError, RuntimeError) as e:  # RuntimeError: a changed flag asks for a password
            raise BundleError(f"{path} is truncated or not a Refold bundle: copy or export it again.", code="damaged") from e
        except OSError as e:
            raise BundleError(f"{path} cannot be read: {e.strerror or e}.", code="unreadable") from e
        manifest = _manifest(manifest_bytes, path)
        if manifest.format > FORMAT:
            raise BundleError(
                f"{path} has bundle format {manifest.format}; this program reads up to {FORMAT}. Update Refold.",
                code="newer-format",
            )
        if manifest.format < 1:
            raise BundleError(f"The manifest of {path} names no format: it is not a Refold bundle.", code="damaged")
        bundle = cls(path, manifest, manifest_bytes, signatures)
        bundle._check_members(members)
        return bundle

    def _check_members(self, members: Mapping[str, zipfile.ZipInfo]) -> None:
        for part in self.manifest.parts:
            info = members.get(part.path)
            if info is None:
                raise BundleError(f"{self.path} lacks {part.path}, which its manifest lists.", code="damaged")
            if info.file_size != part.size:
                raise BundleError(
                    f"{part.path} in {self.path} has {info.file_size} bytes where the manifest says {part.size}.",
                    code="damaged",
                )
        extra = set(members) - set(self._parts) - {MANIFEST, SIGNATURES}
        if extra:
            raise BundleError(f"{self.path} contains {sorted(extra)[0]}, which its manifest does not list.", code="damaged")

    @property
    def paged(self) -> bool:
        """True for a language model whose experts are read while it runs: open it with `refold.experts.PagedModel`."""
        return self.manifest.HasField("experts")

    @property
    def preprocess(self) -> Preprocess:
        """How a picture becomes input. Raises BundleError for a paged language model, which sees no pictures."""
        if self._preprocess is None:
            raise BundleError(f"{self.path} is a language model: run it with `refold edge generate`.", code="paged")
        return self._preprocess

    @property
    def parts(self) -> tuple[pb.Part, ...]:
        return tuple(self.manifest.parts)

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def target(self, name: str | None = None) -> pb.Target:
        """The named target, or the first. Raises BundleError when the bundle has none of that name."""
        for target in self.manifest.targets:
            if name in (None, target.name):
                return target
        have = ", ".join(t.name for t in self.manifest.targets) or "none"
        raise BundleError(f"{self.path} has no target {name!r}; it has: {have}.", code="no-target")

    def read(self, path: str) -> bytes:
        """The bytes of one part, verified. Raises BundleError when absent or changed."""
        return b"".join(self.chunks(path))

    def packed_weights(self) -> dict[str, NDArray[np.int8]]:
        """Integers of fewer than 7 bits, expanded: by their names in the target models. Raises BundleError when damaged."""
        if not self.manifest.packed:
            return {}
        return {name: unpack(codes) for name, codes in weights_from_bytes(self.read(self.manifest.packed)).items()}

    def packed_names(self) -> frozenset[str]:
        """What `packed_weights` would give, unexpanded. Raises BundleError when damaged."""
        return frozenset(weights_from_bytes(self.read(self.manifest.packed))) if self.manifest.packed else frozenset()

    def chunks(self, path: str) -> Iterator[bytes]:
        """The bytes of one part, piece by piece; the digest is checked after the last. Raises BundleError as `read`."""
        part = self._parts.get(path)
        if part is None:
            raise BundleError(f"{self.path} has no part {path!r}.", code="no-part")
        digest, left = hashlib.sha256(), part.size
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(path) as f:
                while chunk := f.read(min(CHUNK, left + 1)):
                    left -= len(chunk)
                    if left < 0:
                        raise BundleError(f"{path} in {self.path} is larger than its manifest says.", code="damaged")
                    digest.update(chunk)
                    yield chunk
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, RuntimeError) as e:
            raise BundleError(f"{path} in {self.path} cannot be read: the file is damaged.", code="damaged") from e
        if left or digest.hexdigest() != part.sha256:
            raise BundleError(f"{path} in {self.path} does not match its digest: the file was changed.", code="digest")

    def check_signatures(self, ring: KeyRing) -> None:
        """Raises SignatureError when the manifest is not signed by enough trusted keys, BundleError when that is unreadable."""
        signed = norms_pb2.SignedRelease()
        try:
            signed.ParseFromString(self._signatures)
        except DecodeError as e:
            raise BundleError(f"The signatures of {self.path} are damaged.", code="damaged") from e
        ring.verify(self._manifest_bytes, signed.signatures)

    def verify(self, ring: KeyRing | None = None, progress: Progress = silent) -> None:
        """Reads every part against its digest and, when a key ring is given, the signatures over the manifest.

        Args:
            progress: called with the bytes of each piece that was read.

        Raises:
            BundleError: a part is damaged.
            SignatureError: not signed by enough trusted keys.
        """
        if ring is not None:
            self.check_signatures(ring)
        for part in self.manifest.parts:
            for chunk in self.chunks(part.path):
                progress(len(chunk))

    def extract(self, directory: str | os.PathLike[str], progress: Progress = silent) -> Path:
        """Writes every part below `directory`, each verified and renamed into place, and manifest.pb. Returns it."""
        root = Path(directory)
        for part in self.manifest.parts:
            target = root / part.path
            try:
                make_directory(target.parent)
            except OSError as e:
                raise StorageError(f"{target.parent} cannot be made: {e.strerror or e}. Give another directory.") from e
            write_atomically(target, self._told(part.path, progress))
        write_atomically(root / MANIFEST, [self._manifest_bytes])
        return root

    def _told(self, path: str, progress: Progress) -> Iterator[bytes]:
        for chunk in self.chunks(path):
            progress(len(chunk))
            yield chunk


def _manifest(content: bytes, path: Path) -> pb.Manifest:
    manifest = pb.Manifest()
    try:
        manifest.ParseFromString(content)
    except DecodeError as e:
        raise BundleError(f"The manifest of {path} is damaged: copy or export it again.", code="damaged") from e
    return manifest


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > LIMITS.bundle_parts:
        raise BundleError(f"{path} has {len(infos)} members; the limit is {LIMITS.bundle_parts}.", code="bundle-too-large")
    for info in infos:
        name = PurePosixPath(info.filename)
        if name.is_absolute() or ".." in name.parts or "\\" in info.filename or info.is_dir():
            raise BundleError(f"{path} contains the unsafe name {info.filename!r}.", code="damaged")
    return {i.filename: i for i in infos}


def _check_sizes(path: Path, size: int, members: Mapping[str, zipfile.ZipInfo], manifest: pb.Manifest) -> None:
    """Everything counts against the limit, except what a paged model stores uncompressed: that is no longer than the file."""
    free: set[str] = set()
    if manifest.HasField("experts"):
        free = {manifest.experts.records, manifest.experts.resident} & set(members)
        pressed = [name for name in free if members[name].compress_type != zipfile.ZIP_STORED]
        if pressed:
            raise BundleError(f"{pressed[0]} in {path} is compressed: it cannot be paged. Export it again.", code="damaged")
    elif size > LIMITS.bundle_bytes:
        raise BundleError(f"{path} has {size} bytes; the limit is {LIMITS.bundle_bytes}.", code="bundle-too-large")
    if sum(i.file_size for name, i in members.items() if name not in free) > LIMITS.bundle_bytes:
        raise BundleError(f"{path} would unpack to more than {LIMITS.bundle_bytes} bytes.", code="bundle-too-large")
    if sum(members[name].file_size for name in free) > size:
        raise BundleError(f"{path} is truncated or not a Refold bundle: copy or export it again.", code="damaged")


def _read_small(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str, path: Path) -> bytes:
    info = members.get(name)
    if info is None:
        raise BundleError(f"{path} has no {name}: it is not a Refold bundle.", code="damaged")
    if info.file_size > LIMITS.manifest_bytes:
        raise BundleError(f"The {name} of {path} is over the limit of {LIMITS.manifest_bytes} bytes.", code="bundle-too-large")
    try:
        return archive.read(name)
    except zlib.error as e:
        raise BundleError(f"The {name} of {path} is damaged: copy or export it again.", code="damaged") from e


def write_bundle(path: str | os.PathLike[str], manifest: pb.Manifest, parts: Mapping[str, bytes], *keys: SigningKey) -> Bundle:
    """Writes a bundle in one step: a temporary file beside it, fsynced, renamed. `manifest.parts` is filled in here.

    Raises:
        StorageError: the disk is full or not writable; nothing is left behind.
    """
    path = Path(path)
    manifest.format = FORMAT
    del manifest.parts[:]
    for name, content in sorted(parts.items()):
        manifest.parts.add(path=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())
    manifest_bytes = manifest.SerializeToString(deterministic=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            with zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
                _add(archive, MANIFEST, manifest_bytes)
                if keys:
                    signed = norms_pb2.SignedRelease(signatures=[k.sign(manifest_bytes) for k in keys])
                    _add(archive, SIGNATURES, signed.SerializeToString(deterministic=True))
                for name, content in sorted(parts.items()):
                    _add(archive, name, content)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as e:
        discard(temporary)
        raise StorageError(f"The bundle {path} cannot be written: {e.strerror or e} ({_free(path.parent)}).") from e
    except BaseException:
        discard(temporary)
        raise
    return Bundle.open(path)


def _free(folder: Path) -> str:
    """For messages: asked where something has gone wrong already."""
    try:
        return f"{shutil.disk_usage(folder).free} bytes free there"
    except OSError as e:
        return f"{folder}: {e.strerror or e}"


def member(name: str, compression: int = zipfile.ZIP_DEFLATED) -> zipfile.ZipInfo:
    """A header without a date or anything else that would differ from one machine to the next."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.compress_type = compression
    info.external_attr = 0o644 << 16
    return info


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(member(name), content)
