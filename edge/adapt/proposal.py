"""What a domain is served with, as functions of values: the release in force beneath, the device's own statistics on top."""

from __future__ import annotations

from dataclasses import dataclass

from edge.adapt.bank import HOME, Domain
from edge.adapt.evidence import Evidence, TapLayout
from edge.adapt.overlay import blended_states, mixed_states
from edge.adapt.settings import AdaptSettings
from edge.serving import ServingState
from edge.updates.inforce import InForce
from refold.errors import NormStateError
from refold.norms import NormState, NormTable
from refold.release import Release

__all__ = ["Composed", "Proposal", "base_of", "compose"]


@dataclass(frozen=True)
class Composed:
    """A domain's state, the share of the device's own statistics in it, and whether such were left out as not admissible."""

    serving: ServingState
    weight: float = 0.0
    refused: bool = False


@dataclass(frozen=True)
class Proposal:
    """What would be served were a set of releases in force. Making one changes nothing.

    Attributes:
        releases: the set.
        present: the domain it was made for, and its state.
        moved: the present domain is served with another release than now.
        afresh: the present domain's evidence begins anew, behind a release of its own.
        moves: for each domain its base, whether that is shared, and its evidence there.
    """

    releases: InForce
    present: Domain
    composed: Composed
    moved: bool
    afresh: bool
    moves: tuple[tuple[Domain, str, bool, Evidence], ...]

    @property
    def serving(self) -> ServingState:
        return self.composed.serving


def base_of(releases: InForce, domain: Domain) -> tuple[str, bool]:
    """Digest of what a domain is served with ("": as exported), and whether others are served with it too."""
    entry = releases.base(domain.key)
    return (entry.digest if entry else ""), entry is None or not entry.key


def compose(
    releases: InForce, domain: Domain, evidence: Evidence, layout: TapLayout, table: NormTable, settings: AdaptSettings
) -> Composed:
    """The domain's base, with as much overlay as there is evidence for. Home gets none."""
    entry = releases.base(domain.key)
    base = releases.content(entry)
    states = dict(base.states) if base else {}
    activations = base.activations if base else ()
    version, name = (entry.version, entry.digest) if entry else (0, "")
    bare = ServingState(states, activations, version, domain.name, False, name)
    if not settings.enabled or domain.name == HOME or evidence.frames <= 0:
        return Composed(bare)
    weight = settings.mix * evidence.frames / (evidence.frames + settings.prior_frames)
    if weight <= 0:
        return Composed(bare)
    own = releases.content(releases.own(domain.key))
    mixed = _mixed(states, own, evidence, weight, layout, table, settings)
    try:
        table.check(mixed)
        table.tensors(mixed, activations)
    except NormStateError:  # statistics of a blind camera, say: what was released is still right
        return Composed(bare, refused=True)
    return Composed(ServingState(mixed, activations, version, domain.name, True, name), weight)


def _mixed(
    states: dict[str, NormState],
    release: Release | None,
    evidence: Evidence,
    weight: float,
    layout: TapLayout,
    table: NormTable,
    settings: AdaptSettings,
) -> dict[str, NormState]:
    """The base's affine parameters on the device's statistics; a release made for this domain has a say in those."""
    if release is None:
        return mixed_states(layout, states, evidence, weight, table.trust_ratio)
    bare = {
        s.name: states.get(s.name, s.exported).with_statistics(s.exported.mean, s.exported.variance)
        if s.kind.has_statistics
        else states.get(s.name, s.exported)
        for s in table.norms
    }
    own = mixed_states(layout, bare, evidence, weight, table.trust_ratio)
    theirs = release.statistics_frames * settings.release_trust
    return blended_states(layout, states, own, evidence.frames / (evidence.frames + theirs), table.trust_ratio)
