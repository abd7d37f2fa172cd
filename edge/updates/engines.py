"""What the updater asks of whatever serves: try a set of releases beside what serves now, then put it in place or drop it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from edge.updates.inforce import LATER, InForce
from refold.release import Release

__all__ = ["Apply", "AtOnce", "Engines", "Nothing", "Staged"]

log = logging.getLogger(__name__)
Apply = Callable[[Release | None], None]


class Staged(Protocol):
    """A set of releases that was tried and can be served. Exactly one of the two is called, once."""

    def serve(self) -> None:
        """Serves it from now on. Cannot fail: everything that could was done while staging."""

    def drop(self) -> None:
        """What served before goes on."""


class Engines(Protocol):
    """The seam; `edge.adaptation.Adaptation` is the device's."""

    def bind(self, domain: str) -> str:
        """Key under which this device knows the domain a release names; "" when it does not, and for ""."""

    def base(self, wanted: InForce) -> str:
        """Digest of the release that would serve at this moment if `wanted` were in force; "" is none."""

    def stage(self, wanted: InForce) -> Staged:
        """Builds and tries what `wanted` would serve at this moment. When it raises, what served before still does."""


class AtOnce:
    """For what cannot be staged, such as the gains of a language model, which are changed in place: `apply` serves the current
    release at once and is called with the one before when the change is dropped. When it raises, the old one must still serve.
    """

    def __init__(self, apply: Apply) -> None:
        self._apply = apply
        self._serving = InForce()

    def bind(self, domain: str) -> str:
        return domain

    def base(self, wanted: InForce) -> str:
        return wanted.current.digest if wanted.current else ""

    def stage(self, wanted: InForce) -> Staged:
        self._apply(wanted.release)
        return _Applied(self, wanted)

    def _put_back(self) -> None:
        try:
            self._apply(self._serving.release)
        except Exception as e:
            log.error("Release %d cannot be put back into service: %s", self._serving.version, e)


class Nothing(AtOnce):
    """Serves nothing: for changes while no daemon runs. The next start builds, tries and serves what is in force then."""

    def __init__(self) -> None:
        super().__init__(lambda release: None)

    def bind(self, domain: str) -> str:
        return LATER + domain if domain else ""


class _Applied:
    def __init__(self, engines: AtOnce, wanted: InForce) -> None:
        self._engines, self._wanted = engines, wanted

    def serve(self) -> None:
        self._engines._serving = self._wanted

    def drop(self) -> None:
        self._engines._put_back()
