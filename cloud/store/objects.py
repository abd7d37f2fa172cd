"""Payloads by content: what is stored under a digest has that digest, or is not there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from refold.atomic import make_directory, sync_directory, write_atomically
from refold.errors import StorageError

__all__ = ["DirectoryObjects", "MemoryObjects", "Objects", "digest_of"]

Needed = Callable[[Sequence[str]], set[str]]
DIGEST = re.compile(r"[0-9a-f]{64}")
CHUNK = 1024**2
SWEPT = 200  # objects dropped under one lock: uploads into the same folder wait for milliseconds


def digest_of(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def check_digest(digest: str) -> str:
    """A digest names a file: anything but 64 lower-case hex digits is refused. Raises StorageError."""
    if not DIGEST.fullmatch(digest):
        raise StorageError(f"{digest[:80]!r} is not a SHA-256 digest.", code="digest")
    return digest


class Objects(Protocol):
    def put(self, payload: bytes) -> str:
        """Stores durably; returns the digest. A second time makes it young again. Raises StorageError: no room, a bad disk."""

    def renew(self, digest: str) -> bool:
        """Makes an object young again; False when it is not there."""

    def get(self, digest: str) -> bytes:
        """Raises StorageError when absent, or when the stored bytes are no longer what they were."""

    def drop(self, digest: str) -> None:
        """Forgets an object; none is no error."""

    def digests(self) -> Iterator[tuple[str, float]]:
        """Every stored digest with the Unix time it was last put or renewed."""

    def sweep(self, before: float, needed: Needed) -> int:
        """Drops objects last put or renewed before a Unix time that nobody needs; returns how many.

        Age and need are looked at while no `put` or `renew` of the same object can run: whoever stores a reference and then
        finds that `renew` succeeds has an object that stays.

        Args:
            needed: names those of some digests that are referred to. Asked twice, the second time for the few that may go.

        Raises:
            StorageError: some could not be dropped; all the others were.
        """


class DirectoryObjects:
    """One file per object, `<root>/<first two digits>/<digest>`: temporary name, fsync, rename, fsync of the directory.

    Changes in a folder happen under its lock file, which other processes (`refold cloud gc`, `add-bundle`) take as well.

    Args:
        free_bytes: kept free on the disk; `put` refuses before that.
    """

    def __init__(self, root: Path, free_bytes: int = 0) -> None:
        self.root, self._free = root, free_bytes
        self._durable: set[str] = set()  # folders whose own entry is known to be on the disk
        try:
            make_directory(root)
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
        with _told(digest, "stored"):
            self._make(path.parent)
            with _locked(path.parent):
                if _holds(path, payload):
                    os.utime(path)  # it is wanted again: garbage collection goes by age
                    return digest
                if self.free() < len(payload):
                    raise StorageError(
                        f"The disk of {self.root} has less than {self._free} bytes free: nothing more is stored. "
                        "Free some space or lower storage.retention_days.",
                        code="disk-full",
                    )
                write_atomically(path, [payload])
        return digest

    def _make(self, folder: Path) -> None:
        """A folder that another thread has just made may not be on the disk yet: each process syncs its entry once itself."""
        if folder.name not in self._durable or not folder.is_dir():
            make_directory(folder)
            sync_directory(self.root)
            self._durable.add(folder.name)

    def renew(self, digest: str) -> bool:
        path = self.path(digest)
        with _told(digest, "kept"):
            if not path.parent.is_dir():
                return False
            with _locked(path.parent):
                try:
                    os.utime(path)
                except FileNotFoundError:
                    return False
                return True

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
        with _told(digest, "deleted"):
            self.path(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[tuple[str, float]]:
        for folder in self._folders():
            yield from ((name, written) for name, written in _files(folder) if DIGEST.fullmatch(name))

    def _folders(self) -> list[Path]:
        try:
            return sorted(f for f in self.root.iterdir() if len(f.name) == 2 and f.is_dir())
        except OSError as e:
            raise StorageError(f"The object directory {self.root} cannot be read: {e.strerror or e}.") from e

    def sweep(self, before: float, needed: Needed) -> int:
        dropped, failures = 0, list[StorageError]()
        for folder in self._folders():
            old = [name for name, written in _files(folder) if written < before]
            digests = [name for name in old if DIGEST.fullmatch(name)]
            suspects = sorted(set(digests) - needed(digests))
            halves = [name for name in old if name.endswith(".tmp")]  # of a process that was killed in `put`
            for i in range(0, len(suspects), SWEPT):
                dropped += self._sweep(folder, suspects[i : i + SWEPT], before, needed, failures)
            if halves:
                self._sweep(folder, halves, before, lambda names: set(), failures)
        if failures:
            raise StorageError(f"{failures[0].message} {len(failures)} such failure(s) in all.", code=failures[0].code)
        return dropped

    def _sweep(self, folder: Path, names: Sequence[str], before: float, needed: Needed, failures: list[StorageError]) -> int:
        dropped = 0
        try:
            with _told(folder.name, "collected"), _locked(folder):
                written = {name: _written(folder / name) for name in names}
                old = [name for name in names if (at := written[name]) is not None and at < before]
                wanted = needed(old)
                for name in old:
                    if name not in wanted:
                        try:
                            (folder / name).unlink(missing_ok=True)
                            dropped += 1
                        except OSError as e:
                            failures.append(StorageError(f"{folder / name} cannot be deleted: {e.strerror or e}."))
        except StorageError as e:
            failures.append(e)
        return dropped


@contextlib.contextmanager
def _told(what: str, done: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise StorageError(f"Object {what[:12]} cannot be {done}: {e.strerror or e}.") from e


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone in this folder, among all threads and processes of this machine."""
    lock = folder / ".lock"
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except PermissionError:  # another user's; a lock asks for no right to write
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _written(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # somebody else was faster
        return None


def _files(folder: Path) -> list[tuple[str, float]]:
    """Names and times of a folder's files; one that goes meanwhile is left out. Raises StorageError."""
    try:
        found = [(f.name, _written(f)) for f in sorted(folder.iterdir())]
    except FileNotFoundError:
        return []
    except OSError as e:
        raise StorageError(f"The object directory {folder} cannot be read: {e.strerror or e}.") from e
    return [(name, at) for name, at in found if at is not None]


def _holds(path: Path, payload: bytes) -> bool:
    """Whether the file is there and undamaged."""
    try:
        with path.open("rb") as f:
            return all(f.read(CHUNK) == payload[i : i + CHUNK] for i in range(0, len(payload) + 1, CHUNK)) and not f.read(1)
    except FileNotFoundError:
        return False


class MemoryObjects:
    """The fake: same contract, gone with the process."""

    def __init__(self) -> None:
        self._payloads: dict[str, tuple[bytes, float]] = {}
        self._lock = threading.Lock()

    def put(self, payload: bytes) -> str:
        digest = digest_of(payload)
        with self._lock:
            self._payloads[digest] = payload, time.time()
        return digest

    def renew(self, digest: str) -> bool:
        with self._lock:
            if check_digest(digest) in self._payloads:
                self._payloads[digest] = self._payloads[digest][0], time.time()
            return digest in self._payloads

    def get(self, digest: str) -> bytes:
        try:
            return self._payloads[check_digest(digest)][0]
        except KeyError:
            raise StorageError(f"Object {digest[:12]} is not stored.", code="no-object") from None

    def drop(self, digest: str) -> None:
        self._payloads.pop(check_digest(digest), None)

    def digests(self) -> Iterator[tuple[str, float]]:
        yield from ((d, written) for d, (_, written) in sorted(self._payloads.items()))

    def sweep(self, before: float, needed: Needed) -> int:
        with self._lock:
            old = [d for d, (_, written) in self._payloads.items() if written < before]
            gone = set(old) - needed(old)
            for digest in gone:
                del self._payloads[digest]
        return len(gone)
