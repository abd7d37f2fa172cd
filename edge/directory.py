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

import fcntl
import os
from pathlib import Path

from refold.atomic import make_directory
from refold.errors import StorageError, UsageError

__all__ = ["DataDirectory"]


class DataDirectory:
    """Raises StorageError when the directory cannot be made or written."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        try:
            make_directory(self.root)
        except OSError as e:
            raise StorageError(f"The data directory {self.root} cannot be made: {e.strerror or e}.") from e
        self._lock: int | None = None

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

    def lock(self) -> None:
        """Raises UsageError when another daemon holds it; released by the kernel however this process ends."""
        try:
            descriptor = os.open(self.root / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise StorageError(f"The data directory {self.root} cannot be written: {e.strerror or e}.") from e
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise UsageError(
                f"Another daemon runs on {self.root.absolute()}: stop it or give another --data.", code="locked"
            ) from None
        self._lock = descriptor

    @property
    def locked_by_another(self) -> bool:
        try:
            self.lock()
        except UsageError:
            return True
        self.unlock()
        return False

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
