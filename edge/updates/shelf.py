"""The stored releases: signed files, each verified and admitted anew whenever it is read. There is no other copy of one."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from pathlib import Path

from edge.releases import ReleaseFiles
from edge.trust import Home
from edge.updates.inforce import InForce
from refold.errors import RefoldError
from refold.release import Release, admit, open_signed
from refold.v1 import norms_pb2

__all__ = ["Shelf"]

log = logging.getLogger(__name__)


class Shelf:
    """Raises StorageError when the directory cannot be made.

    Args:
        home: what a release must fit, and the keys that must have signed it.
    """

    def __init__(self, directory: Path, home: Home) -> None:
        self.home = home
        self._files = ReleaseFiles(directory)

    def put(self, signed: norms_pb2.SignedRelease) -> None:
        """Raises StorageError: nothing of it is left."""
        self._files.put(signed)

    def names(self) -> list[str]:
        return self._files.names()

    def keep_only(self, names: Iterable[str]) -> None:
        self._files.keep_only(names)

    def load(self, name: str) -> Release:
        """A stored release; keys may have been withdrawn since it was written.

        Raises:
            ReleaseError, SignatureError, NormStateError: it is not there, not trusted or not admissible any more.
        """
        release = open_signed(self._files.get(name), self.home.ring)
        admit(release, self.home.table, bundle_digest=self.home.bundle_digest, cohort=self.home.cohort, now_unix_ms=0)
        return release

    def complete(self, wanted: InForce, refused: Collection[str]) -> InForce:
        """The set with the content of every release that may serve; those that cannot be read or are refused have left."""
        wanted = wanted.without(refused)
        while wanted.missing:
            found: dict[str, Release] = {}
            lost: set[str] = set()
            for entry in wanted.missing:
                try:
                    found[entry.digest] = self.load(entry.digest)
                except RefoldError as e:
                    log.warning("Release %d leaves service: %s", entry.version, e.message)
                    lost.add(entry.digest)
            wanted = wanted.holding(found).without(lost)
        return wanted
