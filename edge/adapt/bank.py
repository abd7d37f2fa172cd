"""Domain bank: what a device remembers of every domain it has met, bounded, and as bytes across restarts.

Domain "d0" is the one the bundle was exported for: it is always there and never evicted. The bank keeps statistics and the
digest of the release they were gathered behind; it keeps no release. Which releases there are is the updater's to say.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.adapt.evidence import Evidence
from edge.adapt.features import FEATURES, Reference
from edge.adapt.support import Change
from refold.errors import StorageError

__all__ = ["HOME", "Domain", "DomainBank"]

HOME = "d0"
FORMAT = 4
OLDER = (1, 2, 3)  # measured in another way, and 1 with whole releases without their signatures: statistics are not taken over
HOME_KEY = "home"
F64 = NDArray[np.float64]


@dataclass(eq=False)
class Domain:
    """One domain.

    Attributes:
        name: "d0", "d1", ...
        mean: features, float64 (FEATURES,).
        frames: frames behind `mean`.
        evidence: moments behind `base`, as they are served.
        whole: the same as of the last full set of kept images: what the next set is added to.
        key: tells this domain from every other that has or had its name on this device.
        base: digest of the release it is served with, to which its evidence belongs; "" as exported.
        shared: the base is not this domain's own release.
        past: base to (shared, evidence), of bases still in force beneath the present one: a rollback takes the evidence up
            again. Not kept across restarts, except where a restart finds another base in force.
        seen: number of the last shift at which the domain was present; orders evictions.
    """

    name: str
    mean: F64
    frames: float
    evidence: Evidence
    key: str = ""
    base: str = ""
    shared: bool = True
    past: dict[str, tuple[bool, Evidence]] = field(default_factory=dict)
    seen: int = 0
    whole: Evidence | None = None

    def behind(self, base: str, shared: bool) -> Evidence:
        """Pure: the evidence this domain would have on another base. Behind other norms other moments are seen: it begins anew,
        except that what was gathered on one shared base is a start on the next.
        """
        if base == self.base:
            return self.evidence
        if base in self.past:
            return self.past[base][1]
        if shared:
            known = [(self.shared, self.evidence), *reversed(self.past.values())]
            for was_shared, evidence in known:
                if was_shared:
                    return evidence.copy()
        return Evidence(self.evidence.moments.shape[1], len(self.evidence.mix))

    def move(self, base: str, shared: bool, evidence: Evidence, kept: Collection[str]) -> None:
        """Takes another base and the evidence that `behind` gave; forgets what belongs to bases that are not in `kept`."""
        if base != self.base:
            self.past[self.base] = self.shared, self.evidence
            self.past.pop(base, None)
            self.base, self.evidence = base, evidence
            self.whole = evidence if evidence.frames else None
        self.shared = shared
        self.past = {name: known for name, known in self.past.items() if name in kept}


class DomainBank:
    """Domains by name, at most `limit` of them."""

    def __init__(self, channels: int, groups: int, reference: Reference, limit: int) -> None:
        self._channels, self._groups = channels, groups
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
        name = f"d{self._made}"
        domain = Domain(name, mean.copy(), frames, Evidence(self._channels, self._groups), _key(name, mean))
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

    def dump(self, fingerprint: str) -> bytes:
        """The bank as bytes: an npz without pickles. `fingerprint` names the norm table it belongs to."""
        arrays: dict[str, NDArray[np.generic]] = {}
        rows = []
        for d in self:
            change = d.evidence.change
            shown = [d.evidence.frames, d.seen, d.key, d.base, d.shared, change.agreement, change.diversity]
            rows.append([d.name, d.frames, *shown])
            arrays[f"{d.name}.mean"] = d.mean
            arrays[f"{d.name}.moments"] = d.evidence.moments.astype(np.float32)
            arrays[f"{d.name}.mix"] = d.evidence.mix
        head = {"format": FORMAT, "fingerprint": fingerprint, "made": self._made, "shifts": self._shifts, "domains": rows}
        arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
        out = io.BytesIO()
        np.savez(out, **arrays)  # type: ignore[arg-type]
        return out.getvalue()

    def restore(self, content: bytes, fingerprint: str) -> None:
        """Takes back what `dump` gave. Evidence gathered behind a release counts again when that very release is in force.

        Of the older formats the domains are taken over, so that they are recognised, and none of their statistics: those were
        gathered in another way. They are served as exported until they have been measured again.

        Raises:
            StorageError: damaged, of another format, or of another bundle.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                head = json.loads(arrays["head"].tobytes())
                if head["format"] not in (FORMAT, *OLDER) or head["fingerprint"] != fingerprint:
                    raise StorageError("The domain bank belongs to another bundle or version; starting with an empty one.")
                domains = {}
                for row in head["domains"]:
                    domain = self._restored(row, arrays, head["format"])
                    domains[domain.name] = domain
                if HOME not in domains:
                    raise ValueError("no home domain")
        except (OSError, ValueError, KeyError, TypeError, EOFError, IndexError, zipfile.BadZipFile) as e:
            raise StorageError("The domain bank is damaged; starting with an empty one.", detail=str(e)) from e
        self._domains = dict(sorted(domains.items(), key=lambda item: item[0] != HOME))
        self._made = int(head["made"])
        self._shifts = int(head["shifts"])
        while len(self._domains) > self._limit:
            oldest = min((d for d in self if d.name != HOME), key=lambda d: d.seen)
            del self._domains[oldest.name]

    def _restored(self, row: list[Any], arrays: Mapping[str, NDArray[Any]], form: int) -> Domain:
        name, frames, evidence_frames, seen = row[:4]
        domain = Domain(str(name), arrays[f"{name}.mean"], float(frames), Evidence(self._channels, self._groups))
        domain.seen = int(seen)
        domain.key = str(row[4]) if form != OLDER[0] else _key(domain.name, domain.mean)
        moments = arrays[f"{name}.moments"].astype(np.float64)
        if domain.mean.shape != (FEATURES,) or moments.shape != (2, self._channels):
            raise ValueError(f"shape of {name}")
        if form != FORMAT:
            return domain
        mix = arrays[f"{name}.mix"].astype(np.float64)
        if mix.shape != (self._groups,) or not (np.isfinite(mix).all() and np.isfinite(moments).all()):
            raise ValueError(f"mix of {name}")
        base, shared = str(row[5]), bool(row[6])
        domain.past[base] = shared, Evidence.of(moments, float(evidence_frames), mix, Change(float(row[7]), float(row[8])))
        domain.evidence = domain.past.pop("", (True, domain.evidence))[1]
        domain.whole = domain.evidence if domain.evidence.frames else None
        return domain


def _key(name: str, mean: F64) -> str:
    """Where a name was given before, the first frame's features tell the two domains apart."""
    return HOME_KEY if name == HOME else f"{name}-{hashlib.sha256(mean.tobytes()).hexdigest()[:16]}"
