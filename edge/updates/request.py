"""A rollback asked for on the device itself: `refold edge rollback` leaves a file, the running daemon obeys it.

The file goes away when the rollback was committed, or when there is nothing to go back from; until then it is looked at again.
The commit that obeys it records which file it was, so that one that cannot be removed, or that a killed daemon left, takes
back one release and not two.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from edge.updater import Updater
from refold.atomic import write_atomically
from refold.errors import StorageError

__all__ = ["RollbackRequests", "ask"]

log = logging.getLogger(__name__)
LARGEST = 4096  # bytes; a reason is a sentence
DEFAULT = "rolled back on the device"


def ask(path: Path, reason: str) -> None:
    """Leaves a request. Raises StorageError when it cannot be written."""
    write_atomically(path, [f"{reason}\nrequest {os.urandom(8).hex()}\n".encode()])


class RollbackRequests:
    """Looks for a request when told to.

    Args:
        path: where it would lie.
        updater: the one to ask; None while there is none.
        waiting: whether one may yet come: a request waits for it then.
    """

    def __init__(self, path: Path, updater: Callable[[], Updater | None], waiting: Callable[[], bool]) -> None:
        self._path, self._updater, self._waiting = path, updater, waiting

    def look(self) -> None:
        """Carries out a request, if there is one.

        Raises:
            StorageError: it could not be made durable, or its file not be removed: it is looked at again.
            Exception: whatever keeps the release before from being served: the present one serves on, and the request waits.
        """
        try:
            with self._path.open("rb") as f:
                content, made = f.read(LARGEST), os.fstat(f.fileno())
        except FileNotFoundError:
            return
        except OSError as e:
            raise StorageError(f"The rollback request {self._path} cannot be read: {e.strerror or e}.") from e
        updater = self._updater()
        if updater is None and self._waiting():
            return
        reason = content.decode(errors="replace").partition("\n")[0].strip() or DEFAULT
        if updater is None or (not updater.version and updater.current is None):
            log.warning("A rollback was asked for (%s), but the exported state runs: there is nothing to go back from.", reason)
        else:
            name = hashlib.sha256(content + f"{made.st_mtime_ns} {made.st_ino}".encode()).hexdigest()
            updater.revert(reason, request=name)
        self._remove()

    def _remove(self) -> None:
        try:
            self._path.unlink(missing_ok=True)
        except OSError as e:
            raise StorageError(f"{self._path} cannot be removed: {e.strerror or e}.") from e
