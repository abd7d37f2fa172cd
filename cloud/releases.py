"""Which release a device should have, and how one comes to be: version, signature, roll-out, rollback.

A cohort's releases are for domains. A device that polls gets, one after another, the newest good release of each domain that
it has not yet seen, in the order of versions; the last of them is the cohort's current version. After a rollback it is first
led back below everything that was rolled back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from cloud.store import Decision, Store
from cloud.store.store import GOOD
from cloud.telemetry import RELEASES
from refold.errors import AccessError
from refold.release import Release, decode, digest, seal
from refold.signing import SigningKey
from refold.v1 import norms_pb2

__all__ = ["Next", "Outcome", "Releases", "check_cohort", "next_version"]

Notify = Callable[[str, str], None]
REASON = 300  # characters of an operator's reason


def _nobody(bundle_digest: str, cohort: str) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Next:
    """What a poll should be answered: a version to move to (0: as exported), or None to stay."""

    version: int | None


def next_version(good: Mapping[int, str], installed: int) -> Next:
    """Pure: where a device with version `installed` goes from here.

    Args:
        good: version to domain, of every release of the cohort that was not rolled back.
    """
    if installed and installed not in good:
        return Next(max((v for v in good if v < installed), default=0))
    newest = {domain: version for version, domain in sorted(good.items())}
    return Next(min((v for v in newest.values() if v > installed), default=None))


@dataclass(frozen=True)
class Outcome:
    """A judged candidate on its way from a worker to the store; plain values only.

    Attributes:
        payload: the encoded release, without version and date.
        reason: why it passed or not.
        undecided: it may still pass, on more evidence: a restarted worker makes it again.
    """

    payload: bytes
    passed: bool
    reason: str
    samples_upto: int
    statistics_upto: int
    undecided: bool = False


class Releases:
    """Makes, hands out and takes back releases.

    Args:
        notify: called with (bundle digest, cohort) whenever a pointer moved.
        rolled_back: the same, when it moved back.
    """

    def __init__(self, store: Store, key: SigningKey, notify: Notify = _nobody, rolled_back: Notify = _nobody) -> None:
        self._store, self._key, self._notify, self._rolled_back = store, key, notify, rolled_back
        self._publishing = threading.Lock()

    def publish(self, outcome: Outcome) -> int:
        """Stores a judged candidate. One that passed gets the next version, a signature and the cohort's pointer, in one step.

        Returns:
            The version, 0 for a refused one.
        """
        release = decode(outcome.payload)
        with self._publishing:
            now = int(time.time() * 1000)
            version = self._store.next_version(release.bundle_digest, release.cohort) if outcome.passed else 0
            parent = self._store.current_version(release.bundle_digest, release.cohort)
            release = replace(release, version=version, parent_version=parent, created_unix_ms=now)
            self._store.record(self._decision(release, outcome, now))
        RELEASES.add(1, state="released" if version else _held(outcome))
        if version:
            self._notify(release.bundle_digest, release.cohort)
        return version

    def _decision(self, release: Release, outcome: Outcome, now: int) -> Decision:
        signed = seal(release, self._key) if outcome.passed else None
        return Decision(
            bundle_digest=release.bundle_digest,
            cohort=release.cohort,
            domain=release.domain,
            state=GOOD if outcome.passed else _held(outcome),
            reason=outcome.reason,
            created_ms=now,
            parent_version=release.parent_version,
            version=release.version,
            digest=digest(signed.payload) if signed else "",
            signed=signed.SerializeToString(deterministic=True) if signed else b"",
            samples=release.samples,
            statistics_frames=release.statistics_frames,
            metrics=release.metrics,
            samples_upto=outcome.samples_upto,
            statistics_upto=outcome.statistics_upto,
        )

    def following(self, bundle_digest: str, cohort: str, installed: int) -> Next:
        """Where a device of this cohort goes from `installed`."""
        return next_version(self._store.good_versions(bundle_digest, cohort), installed)

    def current(self, bundle_digest: str, cohort: str) -> int:
        """The cohort's pointer; 0 is as exported."""
        return self._store.current_version(bundle_digest, cohort)

    def signed(self, bundle_digest: str, cohort: str, version: int) -> norms_pb2.SignedRelease:
        """Raises ReleaseError when there is no such version."""
        return norms_pb2.SignedRelease.FromString(self._store.signed_release(bundle_digest, cohort, version))

    def roll_back(self, bundle_digest: str, cohort: str, to_version: int, reason: str) -> int:
        """Points the cohort at an earlier version (0: as exported). What is newer is never offered again.

        Raises:
            ReleaseError: there is no such earlier good version.
        """
        version = self._store.roll_back(bundle_digest, cohort, to_version, reason[:REASON] or "rolled back by an operator")
        self._rolled_back(bundle_digest, cohort)
        self._notify(bundle_digest, cohort)
        return version


def _held(outcome: Outcome) -> str:
    """The state of a candidate that nobody is offered."""
    return "undecided" if outcome.undecided else "refused"


def check_cohort(asked: str, enrolled: str) -> str:
    """A device's cohort is the one it enrolled into. Raises AccessError when it asks for another."""
    if asked and asked != enrolled:
        raise AccessError(
            f"This device belongs to cohort {enrolled!r}, not to {asked!r}: correct its settings.", code="wrong-cohort"
        )
    return enrolled
