"""Which release a device should have, and how one comes to be: version, signature, roll-out, rollback.

A release may be installed for `releases.valid_days` after it was published; each answer to a poll that names a good one carries
a lease that counts these days anew, so that the time runs out only for what the cloud stopped wanting
(docs/adr/015-one-owner-of-releases.md).

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
from refold.lease import Lease, seal_lease
from refold.release import Release, decode, digest, seal
from refold.signing import SigningKey
from refold.v1 import norms_pb2

__all__ = ["Answer", "Next", "Outcome", "Releases", "check_cohort", "next_version"]

Notify = Callable[[str, str], None]
DAY_MS = 86_400_000
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
        generation: how often the cohort had been rolled back when the worker that made it began (`Store.generation`): one that
            began before a rollback publishes nothing after it. None: made by nobody who could be late.
        undecided: it may still pass, on more evidence: a restarted worker makes it again.
    """

    payload: bytes
    passed: bool
    reason: str
    samples_upto: int
    statistics_upto: int
    generation: int | None = None
    undecided: bool = False


@dataclass(frozen=True)
class Answer:
    """A release for a device, with the time in which it may install it."""

    release: norms_pb2.SignedRelease
    lease: norms_pb2.SignedLease


class Releases:
    """Makes, hands out and takes back releases.

    Args:
        notify: called with (bundle digest, cohort) whenever a pointer moved.
        rolled_back: the same, when it moved back.
        valid_days: in which a release may be installed, from its publication and from each poll that it answers.
        now_ms: the clock.
    """

    def __init__(
        self,
        store: Store,
        key: SigningKey,
        notify: Notify = _nobody,
        rolled_back: Notify = _nobody,
        *,
        valid_days: float = 30.0,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._store, self._key, self._notify, self._rolled_back = store, key, notify, rolled_back
        self.valid_ms = round(valid_days * DAY_MS)
        self._now_ms = now_ms
        self._publishing = threading.Lock()

    def publish(self, outcome: Outcome) -> int:
        """Stores a judged candidate. One that passed gets the next version, a signature and the cohort's pointer, in one step.

        Returns:
            The version, 0 for a refused one.

        Raises:
            ReleaseError: code "stale": the cohort was rolled back since its worker began. Nothing was stored.
        """
        release = decode(outcome.payload)
        with self._publishing:
            now = self._now_ms()
            version = self._store.next_version(release.bundle_digest, release.cohort) if outcome.passed else 0
            parent = self._store.current_version(release.bundle_digest, release.cohort)
            release = replace(release, version=version, parent_version=parent, created_unix_ms=now)
            release = replace(release, expires_unix_ms=now + self.valid_ms)
            self._store.record(self._decision(release, outcome, now), outcome.generation)
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

    def answer(self, bundle_digest: str, cohort: str, version: int) -> Answer | None:
        """A release that a device is sent to; None when it was rolled back in the meantime.

        Raises:
            ReleaseError: there is no such version.
        """
        signed = self.signed(bundle_digest, cohort, version)
        now = self._now_ms()
        if version not in self._store.good_versions(bundle_digest, cohort):
            return None
        lease = Lease(bundle_digest, cohort, version, digest(signed.payload), now, now + self.valid_ms)
        return Answer(signed, seal_lease(lease, self._key))

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
