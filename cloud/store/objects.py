"""Payloads by content: what is stored under a digest has that digest, or is not there."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from refold.atomic import write_atomically
from refold.errors import StorageError

__all__ = ["DirectoryObjects", "MemoryObjects", "Objects", "digest_of"]

DIGEST = re.compile(r"[0-9a-f]{64}")


def digest_of(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def check_digest(digest: str) -> str:
    """A digest names a file: anything but 64 lower-case hex digits is refused. Raises StorageError."""
    if not DIGEST.fullmatch(digest):
        raise StorageError(f"{digest[:80]!r} is not a SHA-256 digest.", code="digest")
    return digest


class Objects(Protocol):
    def put(self, payload: bytes) -> str:
        """Stores durably; returns the digest. A second time is a no-op. Raises StorageError: the disk is full or failing."""

    def get(self, digest: str) -> bytes:
        """Raises StorageError when absent, or when the stored bytes are no longer what they were."""

    def drop(self, digest: str) -> None:
        """Forgets an object; none is no error."""

    def digests(self) -> Iterator[tuple[str, float]]:
        """Every stored digest with the Unix time it was written."""


class DirectoryObjects:
    """One file per object, `<root>/<first two digits>/<digest>`: temporary name, fsync, rename, fsync of the directory.

    Args:
        free_bytes: kept free on the disk; `put` refuses before that.
    """

    def __init__(self, root: Path, free_bytes: int = 0) -> None:
        self.root, self._free = root, free_bytes
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise StorageError(f"The object directory {root} cannot be made: {e.strerror}.") from e

    def path(self, digest: str) -> Path:
        return self.root / check_digest(digest)[:2] / digest

    def free(self) -> int:
        """Bytes free beyond what is kept back; below 0 uploads are refused."""
        return shutil.disk_usage(self.root).free - self._free

    def put(self, payload: bytes) -> str:
        digest = digest_of(payload)
        path = self.path(digest)
        if path.exists():
            os.utime(path)  # it is wanted again: garbage collection goes by age
            return digest
        if self.free() < len(payload):
            raise StorageError(
                f"The disk of {self.root} has less than {self._free} bytes free: nothing more is stored. "
                "Free some space or lower storage.retention_days.",
                code="disk-full",
            )
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, [payload])
        return digest

    def get(self, digest: str) -> bytes:
        try:
            payload = self.path(digest).read_bytes()
        except FileNotFoundError:
            raise StorageError(f"Object {digest[:12]} is not stored in {self.root}.", code="no-object") from None
        except OSError as e:
            raise StorageError(f"Object {digest[:12]} cannot be read: {e.strerror}.") from e
        if digest_of(payload) != digest:
            raise StorageError(f"Object {digest[:12]} in {self.root} was changed on disk.", code="damaged")
        return payload

    def drop(self, digest: str) -> None:
        try:
            self.path(digest).unlink()
        except OSError as e:
            if e.errno != errno.ENOENT:
                raise StorageError(f"Object {digest[:12]} cannot be deleted: {e.strerror}.") from e

    def digests(self) -> Iterator[tuple[str, float]]:
        for folder in sorted(self.root.iterdir()):
            if folder.is_dir() and len(folder.name) == 2:
                for file in sorted(folder.iterdir()):
                    if DIGEST.fullmatch(file.name):
                        yield file.name, file.stat().st_mtime


class MemoryObjects:
    """The fake: same contract, gone with the process."""

    def __init__(self) -> None:
        self._payloads: dict[str, bytes] = {}

    def put(self, payload: bytes) -> str:
        digest = digest_of(payload)
        self._payloads[digest] = payload
        return digest

    def get(self, digest: str) -> bytes:
        try:
            return self._payloads[check_digest(digest)]
        except KeyError:
            raise StorageError(f"Object {digest[:12]} is not stored.", code="no-object") from None

    def drop(self, digest: str) -> None:
        self._payloads.pop(check_digest(digest), None)

    def digests(self) -> Iterator[tuple[str, float]]:
        yield from ((d, 0.0) for d in sorted(self._payloads))
