"""Which signed releases are in force on a device: a value, and every change of it a function.

A cohort has one line of versions. Each release is for one domain, or without a domain the base of all that have none of their
own, so several are in force at a time; the one with the highest version is *current*: the version polls and heartbeats name.

    ordered(entry)      a newer version joins; an older one is an operator's rollback: whatever is newer than it leaves
    without(digests)    refused, unreadable or withdrawn releases leave; the one before each of them takes its place
    InForce()           as exported

What left comes back only by another order. Nothing else on the device keeps a release, so nothing else can bring it back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from refold.release import Release

__all__ = ["LATER", "Entry", "InForce"]

PER_SLOT = 2  # the release that serves and the one to go back to
LATER = "?"  # begins the key of an entry that is to be bound at the next start
MOST = 64  # entries in all; a release has some kilobytes, and the oldest go first


@dataclass(frozen=True)
class Entry:
    """One release in force.

    Attributes:
        version: in the cohort's line.
        domain: as the release names it; "" is for all domains.
        digest: of its payload: the name of its file.
        key: of this device's domain that it serves; "" while the device knows no such domain (and for a release for all).
    """

    version: int
    domain: str
    digest: str
    key: str = ""

    @property
    def slot(self) -> tuple[str, str]:
        """Releases of one slot supersede each other."""
        return ("key", self.key) if self.key else ("domain", self.domain)


@dataclass(frozen=True)
class InForce:
    """The releases in force, by rising version.

    Attributes:
        releases: digest to content, of the entries that were read so far; see `missing`.
    """

    entries: tuple[Entry, ...] = ()
    releases: Mapping[str, Release] = field(default_factory=dict)

    @property
    def current(self) -> Entry | None:
        """The newest; None as exported."""
        return self.entries[-1] if self.entries else None

    @property
    def version(self) -> int:
        """Of `current`; 0 as exported."""
        return self.entries[-1].version if self.entries else 0

    @property
    def release(self) -> Release | None:
        """Content of `current`."""
        return self.content(self.current)

    @property
    def newest(self) -> tuple[Entry, ...]:
        """The newest of each slot: those that serve as soon as their domain is there."""
        return tuple(sorted({e.slot: e for e in self.entries}.values(), key=lambda e: e.version))

    @property
    def digests(self) -> frozenset[str]:
        """Of every entry: the files to keep."""
        return frozenset(e.digest for e in self.entries)

    @property
    def missing(self) -> tuple[Entry, ...]:
        """Entries of `newest` whose content has not been read yet."""
        return tuple(e for e in self.newest if e.digest not in self.releases)

    def own(self, key: str) -> Entry | None:
        """The release made for the domain with this key."""
        return next((e for e in reversed(self.entries) if key and e.key == key), None)

    def base(self, key: str) -> Entry | None:
        """What a domain is served with: its own release, else the one for all, else None: as exported."""
        return self.own(key) or next((e for e in reversed(self.entries) if not e.domain), None)

    def content(self, entry: Entry | None) -> Release | None:
        return self.releases[entry.digest] if entry else None

    def allows(self, digest: str) -> bool:
        """Whether an engine made of this release may serve; "" is the exported state."""
        return not digest or any(e.digest == digest and (e.key or not e.domain) for e in self.newest)

    def ordered(self, entry: Entry, release: Release) -> InForce:
        """With one more release; those with its version or a newer one leave."""
        kept = [e for e in self.entries if e.version < entry.version and e.digest != entry.digest]
        return _bounded([*kept, entry], {**self.releases, entry.digest: release})

    def bound(self, bind: Callable[[str], str]) -> InForce:
        """With keys for what was taken over where no domain was known; see `LATER`."""
        entries = [replace(e, key=bind(e.domain)) if e.key.startswith(LATER) else e for e in self.entries]
        return _bounded(entries, self.releases)

    def without(self, digests: Collection[str]) -> InForce:
        return _bounded([e for e in self.entries if e.digest not in digests], self.releases)

    def holding(self, releases: Mapping[str, Release]) -> InForce:
        """The same with more content read."""
        return _bounded(list(self.entries), {**self.releases, **releases})


def _bounded(entries: list[Entry], releases: Mapping[str, Release]) -> InForce:
    """At most PER_SLOT of each slot and MOST in all, with what is known of their content."""
    kept: list[Entry] = []
    count: dict[tuple[str, str], int] = {}
    for entry in reversed(entries):
        count[entry.slot] = count.get(entry.slot, 0) + 1
        if count[entry.slot] <= PER_SLOT and len(kept) < MOST:
            kept.append(entry)
    return InForce(tuple(reversed(kept)), {e.digest: releases[e.digest] for e in kept if e.digest in releases})
