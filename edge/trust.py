"""What a device accepts as its next release: a function of values, so that every attack is a test without a disk or a network.

A release arrives in one of two ways:

* *ordered*: named by the answer to the device's own poll, over a connection whose server proved to be the cloud. It may have
  any version: a lower one is an operator's rollback.
* *offered*: carried by anything else (a file, a cache, a neighbour). Its signature proves who made it, not that anybody wants
  it now; so it must be newer than everything this device ever ran. An old release that is played again is refused.

Either way it must be signed, for this bundle and cohort, admissible, not expired, not one that failed here before, and the only
release of its version (docs/adr/004-which-release-a-device-runs.md). Its expiry is its own or the later one of a lease
(docs/adr/015-one-owner-of-releases.md); the release that runs does not expire.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from refold.errors import ReleaseError
from refold.lease import Lease, open_lease
from refold.norms import NormTable
from refold.release import Release, admit, digest, open_signed
from refold.signing import KeyRing
from refold.v1 import norms_pb2 as pb

__all__ = ["Home", "Memory", "examine", "examine_lease"]

LATEST_MS = 253_402_300_799_000  # the end of the year 9999: as late as a date can be told


@dataclass(frozen=True)
class Home:
    """What a release must fit. Attributes: `table` is the bundle's norm table; `ring` the keys enrolment brought."""

    bundle_digest: str
    cohort: str
    table: NormTable
    ring: KeyRing


@dataclass(frozen=True)
class Memory:
    """What a device remembers of releases; every entry came from bytes whose signature was verified.

    Attributes:
        current: digest of the release in use, empty when running as exported.
        highest_version: of all releases ever in use.
        versions: version to digest, of all releases ever admitted.
        refused: digest to reason, of those that failed on this device.
        newest_unix_ms: latest creation time seen: the clock is at least that late, whatever it shows.
    """

    current: str = ""
    highest_version: int = 0
    versions: Mapping[int, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    newest_unix_ms: int = 0


def examine(
    signed: pb.SignedRelease,
    home: Home,
    memory: Memory,
    *,
    ordered: bool,
    now_unix_ms: int,
    lease: Lease | None = None,
) -> Release:
    """Returns the release when the device may install it. The signature is checked first: forged bytes are never parsed.

    Args:
        lease: from `examine_lease`; extends the release's own expiry.

    Raises:
        SignatureError: not signed by enough trusted keys, or changed on its way.
        ReleaseError: code is one of release-too-large, damaged, format, wrong-bundle, wrong-cohort, version, expired,
            equivocation, failed-before, replayed.
        NormStateError: its states are not admissible for the bundle.
    """
    release = open_signed(signed, home.ring)
    name = digest(signed.payload)
    admit(release, home.table, bundle_digest=home.bundle_digest, cohort=home.cohort, now_unix_ms=0)
    now = max(now_unix_ms, memory.newest_unix_ms, lease.issued_unix_ms if lease else 0)
    until = max(release.expires_unix_ms, lease.expires_unix_ms if lease else 0)
    if release.expires_unix_ms and name != memory.current and now > until:
        raise ReleaseError(
            f"Release {release.version} could be installed until {_date(until)} and has expired by this device's time, "
            f"{_date(now)}. Poll the cloud, which renews what it still wants, or check the clock.",
            code="expired",
        )
    known = memory.versions.get(release.version, name)
    if known != name:
        raise ReleaseError(
            f"Two different releases call themselves version {release.version} ({known[:12]} and {name[:12]}): the second is "
            "refused. If the cloud's database was set up anew under the same authority, use another cohort.",
            code="equivocation",
        )
    if name in memory.refused:
        raise ReleaseError(
            f"Release {release.version} failed on this device before: {memory.refused[name]}", code="failed-before"
        )
    if not ordered and name != memory.current and release.version <= memory.highest_version:
        raise ReleaseError(
            f"Release {release.version} is not newer than {memory.highest_version}, which this device has run: "
            "an older one is installed only when the cloud orders it (refold cloud rollback).",
            code="replayed",
        )
    return release


def examine_lease(signed: pb.SignedLease, payload: bytes, home: Home) -> Lease:
    """The lease that came beside a release with this payload.

    Raises:
        SignatureError: not signed by enough trusted keys, or changed on its way.
        ReleaseError: code "lease": damaged, or for another release, bundle or cohort.
    """
    lease = open_lease(signed, home.ring)
    if (lease.release_digest, lease.bundle_digest, lease.cohort) != (digest(payload), home.bundle_digest, home.cohort):
        raise ReleaseError(
            f"The lease beside the release is for release {lease.version} ({lease.release_digest[:12]}): refused.", code="lease"
        )
    return lease


def _date(unix_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(min(max(unix_ms, 0), LATEST_MS) / 1000))
