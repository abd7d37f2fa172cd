"""Signed releases as files named by the digest of their payload: complete or absent, and checked when read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from google.protobuf.message import DecodeError

from refold.atomic import make_directory, sync_directory, write_atomically
from refold.errors import ReleaseError, StorageError
from refold.limits import LIMITS
from refold.release import digest
from refold.v1 import norms_pb2 as pb

__all__ = ["ReleaseFiles"]

SUFFIX = ".release"
ENVELOPE_BYTES = 4096  # signatures and framing around the payload


class ReleaseFiles:
    """A directory of `<digest>.release`. Raises StorageError when it cannot be made."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            make_directory(directory)
        except OSError as e:
            raise StorageError(f"{directory} cannot be made: {e.strerror or e}.") from e

    def _path(self, name: str) -> Path:
        return self.directory / (name + SUFFIX)

    def put(self, signed: pb.SignedRelease) -> str:
        """Writes and syncs; returns the digest. Raises StorageError: nothing of it is left."""
        name = digest(signed.payload)
        write_atomically(self._path(name), [signed.SerializeToString(deterministic=True)])
        return name

    def get(self, name: str) -> pb.SignedRelease:
        """Raises ReleaseError when the file is gone, damaged or not what its name says."""
        try:
            with self._path(name).open("rb") as f:
                signed = pb.SignedRelease.FromString(f.read(LIMITS.release_bytes + ENVELOPE_BYTES))
        except (OSError, DecodeError) as e:
            raise ReleaseError(f"The stored release {name[:12]} cannot be read: {e}.", code="damaged") from e
        if digest(signed.payload) != name:
            raise ReleaseError(f"The stored release {name[:12]} was changed on the disk.", code="damaged")
        return signed

    def names(self) -> list[str]:
        return sorted(p.name.removesuffix(SUFFIX) for p in self.directory.glob("*" + SUFFIX))

    def keep_only(self, names: Iterable[str]) -> None:
        """Removes every other release and what a crash left half written. What cannot be removed is left for the next time."""
        wanted = {name + SUFFIX for name in names if name}
        try:
            for path in self.directory.iterdir():
                if path.name not in wanted and path.name.endswith((SUFFIX, ".tmp")):
                    path.unlink(missing_ok=True)
            sync_directory(self.directory)
        except OSError:
            return
