"""What a domain still lacks before it is trained, or before its undecided candidate is judged again: in numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cloud.gating.kept import Kept
from cloud.settings import GateSettings

__all__ = ["Waiting", "levels", "look", "sentence"]

HOME = "d0"
TOLD = 4  # domains in a sentence; all are in the messages


@dataclass(frozen=True)
class Waiting:
    """One domain's evidence; picklable.

    Attributes:
        samples, samples_wanted: for training, counted as the distiller counts; wanted 0: it does not say.
        held_out, held_out_wanted: for the gate.
        undecided: a candidate is kept, and waits for the held-out samples alone.
    """

    domain: str
    samples: int
    samples_wanted: int
    held_out: int
    held_out_wanted: int
    undecided: bool = False

    def sentence(self) -> str:
        name = self.domain or "all domains"
        held = f"{self.held_out} of {self.held_out_wanted} held out"
        if self.undecided:
            return f"{name}: undecided, {held}"
        samples = f"{self.samples} of {self.samples_wanted} samples, " if self.samples_wanted else ""
        return f"{name}: {samples}{held}"


class Counts(Protocol):
    """A distiller that says how far a domain is."""

    def progress(self) -> Mapping[str, tuple[int, int]]:
        """Domain to (samples it has, samples its next training wants)."""


def look(
    distiller: object,
    held_out: Callable[[str], int],
    kept: Mapping[str, Kept],
    settings: GateSettings,
    *,
    home: bool,
) -> list[Waiting]:
    """Every domain with evidence, furthest first.

    Args:
        distiller: one without `progress` tells nothing about samples.
        held_out: stored held-out samples of a domain.
        kept: undecided candidates.
        home: whether the domain of the export is trained at all.
    """
    told: Mapping[str, tuple[int, int]] = distiller.progress() if hasattr(distiller, "progress") else {}
    found = []
    for domain in sorted({*told, *kept}):
        if domain == HOME and not home:
            continue
        undecided = kept.get(domain)
        wanted = undecided.wanted if undecided is not None else settings.held_back
        found.append(Waiting(domain, *told.get(domain, (0, 0)), held_out(domain), wanted, undecided is not None))
    return sorted(found, key=lambda w: (not w.undecided, -w.samples, w.domain))


def sentence(waiting: Sequence[Waiting]) -> str:
    """For `refold cloud status` and the log."""
    if not waiting:
        return "waiting for evidence: no samples to train on yet"
    more = f"; {len(waiting) - TOLD} more domains" if len(waiting) > TOLD else ""
    return f"waiting for evidence: {'; '.join(w.sentence() for w in waiting[:TOLD])}{more}"


def levels(bundle_digest: str, cohort: str, waiting: Sequence[Waiting]) -> list[tuple[dict[str, str], float]]:
    """For Prometheus: labels and value of each number."""
    return [
        ({"bundle": bundle_digest[:16], "cohort": cohort, "domain": w.domain, "kind": kind}, float(getattr(w, kind)))
        for w in waiting
        for kind in ("samples", "samples_wanted", "held_out", "held_out_wanted", "undecided")
    ]
