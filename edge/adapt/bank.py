"""Domain bank: what a device remembers of every domain it has met, bounded, and as bytes across restarts.

Domain "d0" is the one the bundle was exported for: it is always there and never evicted.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge.adapt.evidence import Evidence
from edge.adapt.features import FEATURES, Reference
from refold.errors import StorageError
from refold.release import Release, decode, encode

__all__ = ["HOME", "Domain", "DomainBank"]

HOME = "d0"
NEVER = -1
FORMAT = 1
F64 = NDArray[np.float64]


@dataclass(eq=False)
class Domain:
    """One domain.

    Attributes:
        name: "d0", "d1", ...
        mean: features, float64 (FEATURES,).
        frames: frames behind `mean`.
        evidence: tapped moments under the present base state.
        taps: tapped frames since the domain was met or its base changed; the clock of rebuilds.
        rebuild_at: number of taps at which the overlay is built next.
        settle_at: number of taps at which the frames tapped so far are looked at again; NEVER: their statistics are settled.
        release: newest release made for this domain.
        before: the evidence from before it; a rollback takes it up again. Not kept across restarts.
        seen: number of the last shift at which the domain was present; orders evictions.
    """

    name: str
    mean: F64
    frames: float
    evidence: Evidence
    taps: int = 0
    rebuild_at: int = 0
    settle_at: int = NEVER
    release: Release | None = None
    seen: int = 0
    before: Evidence | None = None
    unreported: Evidence = field(init=False)
    first_frame: int = 0
    last_frame: int = 0

    def __post_init__(self) -> None:
        self.unreported = Evidence(self.evidence.moments.shape[1])

    def take(self, release: Release) -> None:
        """Serves a release from now on. Behind its norms other moments will be seen: evidence begins anew."""
        if self.before is None:
            self.before = self.evidence
        self.evidence = Evidence(self.evidence.moments.shape[1])
        self.release = release
        self.taps = self.rebuild_at = 0
        self.settle_at = NEVER  # a release brings statistics measured behind its own norms

    def drop_release(self) -> None:
        """Back to what is known without a release of its own."""
        self.release = None
        if self.before is not None:
            self.evidence, self.before = self.before, None


class DomainBank:
    """Domains by name, at most `limit` of them."""

    def __init__(self, channels: int, reference: Reference, limit: int) -> None:
        self._channels = channels
        self._limit = limit
        self._domains: dict[str, Domain] = {}
        self._made = 0
        self._shifts = 0
        self.add(self.new(reference.mean, float(reference.frames)))

    def __iter__(self) -> Iterator[Domain]:
        return iter(self._domains.values())

    def __len__(self) -> int:
        return len(self._domains)

    @property
    def home(self) -> Domain:
        return self._domains[HOME]

    def get(self, name: str) -> Domain | None:
        return self._domains.get(name)

    def new(self, mean: F64, frames: float) -> Domain:
        """A domain with a name of its own, not yet remembered."""
        domain = Domain(f"d{self._made}", mean.copy(), frames, Evidence(self._channels))
        self._made += 1
        return domain

    def discard(self, domain: Domain) -> None:
        """Gives back the name of a domain that turned out to be a known one."""
        if domain.name == f"d{self._made - 1}" and domain.name not in self._domains:
            self._made -= 1

    def add(self, domain: Domain) -> None:
        """Remembers a domain; the one seen longest ago makes room."""
        while len(self._domains) >= self._limit:
            oldest = min((d for d in self if d.name != HOME), key=lambda d: d.seen)
            del self._domains[oldest.name]
        self._domains[domain.name] = domain
        self.touch(domain)

    def drop(self, domain: Domain) -> None:
        """Forgets a domain that was joined to another."""
        self._domains.pop(domain.name, None)

    def touch(self, domain: Domain) -> None:
        self._shifts += 1
        domain.seen = self._shifts

    def like(self, mean: F64, frames: float, reference: Reference, floor: float, *others: Domain) -> Domain | None:
        """The remembered domain, not one of `others`, whose features are the same as far as so many frames can tell."""
        best: tuple[float, Domain] | None = None
        for domain in self:
            if domain in others:
                continue
            noise = 1.0 / max(frames, 1.0) + 1.0 / max(domain.frames, 1.0)
            distance = reference.distance(mean, domain.mean)
            if distance < floor / 2 + 2.5 * noise and (best is None or distance < best[0]):
                best = (distance, domain)
        return best[1] if best else None

    def purge(self, newest: int) -> None:
        """Forgets every release with a version above `newest`."""
        for domain in self:
            if domain.release is not None and domain.release.version > newest:
                domain.drop_release()

    def dump(self, fingerprint: str) -> bytes:
        """The bank as bytes: an npz without pickles. `fingerprint` names the norm table it belongs to."""
        arrays: dict[str, NDArray[np.generic]] = {}
        rows = []
        for d in self:
            rows.append([d.name, d.frames, d.evidence.frames, d.seen])
            arrays[f"{d.name}.mean"] = d.mean
            arrays[f"{d.name}.moments"] = d.evidence.moments.astype(np.float32)
            if d.release is not None:
                arrays[f"{d.name}.release"] = np.frombuffer(encode(d.release), np.uint8)
        head = {"format": FORMAT, "fingerprint": fingerprint, "made": self._made, "shifts": self._shifts, "domains": rows}
        arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
        out = io.BytesIO()
        np.savez(out, **arrays)  # type: ignore[arg-type]
        return out.getvalue()

    def restore(self, content: bytes, fingerprint: str) -> None:
        """Takes back what `dump` gave. Raises StorageError: damaged, of another format, or of another bundle."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                head = json.loads(arrays["head"].tobytes())
                if head["format"] != FORMAT or head["fingerprint"] != fingerprint:
                    raise StorageError("The domain bank belongs to another bundle or version; starting with an empty one.")
                domains = {}
                for name, frames, evidence_frames, seen in head["domains"]:
                    domain = Domain(str(name), arrays[f"{name}.mean"], float(frames), Evidence(self._channels))
                    domain.evidence.moments = arrays[f"{name}.moments"].astype(np.float64)
                    domain.evidence.frames = float(evidence_frames)
                    domain.taps = int(evidence_frames)
                    domain.seen = int(seen)
                    if f"{name}.release" in arrays:
                        domain.release = decode(arrays[f"{name}.release"].tobytes())
                    if domain.mean.shape != (FEATURES,) or domain.evidence.moments.shape != (2, self._channels):
                        raise ValueError(f"shape of {name}")
                    domains[domain.name] = domain
                if HOME not in domains:
                    raise ValueError("no home domain")
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
            raise StorageError("The domain bank is damaged; starting with an empty one.", detail=str(e)) from e
        self._domains = dict(sorted(domains.items(), key=lambda item: item[0] != HOME))
        self._made = int(head["made"])
        self._shifts = int(head["shifts"])
        while len(self._domains) > self._limit:
            oldest = min((d for d in self if d.name != HOME), key=lambda d: d.seen)
            del self._domains[oldest.name]
