"""A device's data directory: what lies where, and one daemon at a time.

identity/           certificate, key, CA, release keys (edge/enrol.py)
outbox.sqlite       samples and reports that wait, the byte budget
updates/            update state and signed releases, by bundle and cohort
adapter-<bundle>    the domain bank
cache/              optimised graphs; may be deleted
status.json         what the daemon last said of itself
daemon.lock         held while a daemon runs
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from refold.atomic import make_directory
from refold.errors import StorageError, UsageError

__all__ = ["DataDirectory"]

HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})
PATIENCE_S = 0.5  # somebody who only looks whether a daemon runs holds the lock for an instant


class DataDirectory:
    """Paths, and the lock. Nothing is made before `lock`.

    The directory itself is locked beside daemon.lock, because that also works where no file can be made: on a read-only or full
    disk.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._locks: list[int] = []
        self._taking = threading.Lock()  # a thread that hangs in the disk must not compete with the one that tries again

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def outbox(self) -> Path:
        return self.root / "outbox.sqlite"

    @property
    def updates(self) -> Path:
        return self.root / "updates"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def rollback_request(self) -> Path:
        return self.root / "rollback.request"

    def bank(self, bundle_digest: str) -> Path:
        return self.root / f"adapter-{bundle_digest[:16]}"

    def check(self) -> None:
        """Raises StorageError when the path leads through a file: no disk that recovers will make a directory of it."""
        for path in (self.root, *self.root.absolute().parents):
            if _is(path.exists) and not path.is_dir():
                raise StorageError(f"The data directory {self.root} cannot be made: {path} is not a directory.")

    def lock(self) -> None:
        """Makes the directory and takes it for this process; without effect when that is done. Released by the kernel however
        this process ends.

        Raises:
            UsageError: another daemon holds it.
            StorageError: it cannot be made.
        """
        with self._taking:
            self._lock()

    def _lock(self) -> None:
        if self._locks:
            return
        try:
            make_directory(self.root)
            end = time.monotonic() + PATIENCE_S
            while not self._take(fcntl.LOCK_EX):
                if time.monotonic() > end:
                    raise UsageError(
                        f"Another daemon runs on {self.root.absolute()}: stop it or give another --data.", code="locked"
                    )
                time.sleep(0.05)
        except OSError as e:
            raise StorageError(f"The data directory {self.root} cannot be made: {e.strerror or e}.") from e

    def _take(self, how: int) -> bool:
        """False: another holds it. Raises OSError when there is no directory."""
        taken: list[int] = []
        try:
            taken.append(os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            flags = os.O_RDWR | os.O_CREAT if how == fcntl.LOCK_EX else os.O_RDONLY
            with suppress(OSError):  # older daemons lock this one alone
                taken.append(os.open(self.root / "daemon.lock", flags | os.O_CLOEXEC, 0o644))
            free = all(_locked(descriptor, how) for descriptor in taken)
        except BaseException:
            _close(taken)
            raise
        if not free:
            _close(taken)
            return False
        self._locks = taken
        return True

    @property
    def held(self) -> bool:
        """Whether this process holds the directory. Waits for nothing."""
        return bool(self._locks)

    @property
    def locked_by_another(self) -> bool:
        """Raises StorageError when that cannot be found out."""
        if self._locks or not _is(self.root.exists):
            return False
        try:
            free = self._take(fcntl.LOCK_SH)
        except OSError as e:
            raise StorageError(f"The data directory {self.root} cannot be looked at: {e.strerror or e}.") from e
        self.unlock()
        return not free

    def unlock(self) -> None:
        _close(self._locks)
        self._locks = []


def _is(question: Callable[[], bool]) -> bool:
    """False where this user may not even look (Python raises PermissionError)."""
    try:
        return question()
    except OSError:
        return False


def _locked(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except OSError as e:
        return e.errno not in HELD  # a file system without locks cannot keep two daemons apart
    return True


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)
