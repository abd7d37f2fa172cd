"""One change of the releases in force on its way through the table, and what becomes of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from edge.updates.engines import Staged
from edge.updates.inforce import Entry, InForce
from edge.updates.table import Event
from refold.errors import NetworkError, RefoldError, StorageError
from refold.release import Release
from refold.v1 import norms_pb2

__all__ = ["Change", "Outcome", "Result", "passing", "said", "survived"]

log = logging.getLogger(__name__)


class Result(Enum):
    NOTHING = "nothing"  # no order, or already so
    INSTALLED = "installed"
    EXPORTED = "exported"  # back to the state the bundle came with
    REFUSED = "refused"  # will be refused again
    FAILED = "failed"  # worth another try: disk full, out of memory


@dataclass(frozen=True)
class Outcome:
    """What became of an order.

    Attributes:
        version: what runs now.
        error: why that is not what was ordered.
        refused: version of a genuine release that this device will never run, else 0: a later one may be asked for.
    """

    result: Result
    version: int
    error: RefoldError | None = None
    refused: int = 0

    @property
    def settled(self) -> bool:
        """The device runs what the cloud wants."""
        return self.error is None


@dataclass
class Change:
    """One event on its way through the table.

    Attributes:
        before, after: the releases in force.
        refuse: entry and reason, of those that are never to be served again; committed with the change.
        signed, release: what an installation brings.
        newest_ms: the latest time that what it brings proves.
        request: the rollback request that asked for it.
        blamed: a new release that may turn out to be at fault; one that serves a domain has shown that it can.
        floor: highest version ever in use, before this.
        stored: digest of the current release in the state file, when a start began; None: it is an older Refold's file.
    """

    event: Event
    before: InForce
    after: InForce
    refuse: list[tuple[Entry, str]] = field(default_factory=list)
    reason: str = ""
    signed: norms_pb2.SignedRelease | None = None
    release: Release | None = None
    newest_ms: int = 0
    request: str = ""
    stored: str | None = None
    floor: int = 0
    staged: Staged | None = None

    @property
    def blamed(self) -> Entry | None:
        new = self.after.current if self.release is not None else None
        return new if new is not None and all(e.digest != new.digest for e in self.before.newest) else None

    @property
    def confirmed(self) -> bool:
        """At a start: the state file says already what is served."""
        current = self.after.current
        same = not self.refuse and self.after.entries == self.before.entries
        return same and self.stored == (current.digest if current else "")


def passing(cause: Exception) -> bool:
    """Not the release's fault: another try may do."""
    return isinstance(cause, (StorageError, NetworkError, MemoryError))


def said(cause: Exception) -> str:
    return cause.message if isinstance(cause, RefoldError) else f"{type(cause).__name__}: {cause}"


@contextmanager
def survived(what: str) -> Iterator[None]:
    """Nothing that happens to the disk keeps a device from serving."""
    try:
        yield
    except StorageError as e:
        log.warning("%s: %s", what, e.message)
