"""What a domain is served with, as functions of values: the release in force beneath, the device's own statistics on top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edge.adapt.bank import HOME, Domain
from edge.adapt.evidence import Evidence
from edge.adapt.overlay import blended_states
from edge.adapt.settings import AdaptSettings
from edge.adapt.support import supported
from edge.serving import ServingState
from edge.updates.inforce import InForce
from refold.errors import NormStateError
from refold.norms import NormState, NormTable
from refold.statistics import StatisticsModel

__all__ = ["Composed", "Proposal", "base_of", "base_state", "compose", "on_exported_statistics"]


@dataclass(frozen=True)
class Composed:
    """A domain's state.

    Attributes:
        weight: share of the device's own statistics in it.
        refused: such were left out as not admissible.
        unsupported: such were left out, because the images do not speak for them.
    """

    serving: ServingState
    weight: float = 0.0
    refused: bool = False
    unsupported: bool = False


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


def compose(releases: InForce, domain: Domain, evidence: Evidence, model: StatisticsModel, settings: AdaptSettings) -> Composed:
    """The domain's base, with the shift its evidence shows. Home gets none."""
    entry = releases.base(domain.key)
    base = releases.content(entry)
    states = dict(base.states) if base else {}
    activations = base.activations if base else ()
    version, name = (entry.version, entry.digest) if entry else (0, "")
    bare = ServingState(states, activations, version, domain.name, False, name)
    if not settings.enabled or domain.name == HOME or evidence.frames <= 0:
        return Composed(bare)
    table = model.layout.table
    if not supported(model.early(evidence.moments, evidence.frames, evidence.mix), evidence.change):
        return Composed(bare, unsupported=True)
    # A shift is told from the exported statistics: on a release's own it would count twice.
    own, share = model.served(on_exported_statistics(table, states), evidence.moments, evidence.frames, evidence.mix)
    weight = float(share.mean())
    release = releases.content(releases.own(domain.key))
    if release is not None:
        theirs = release.statistics_frames * settings.release_trust
        own = blended_states(model.layout, states, own, evidence.frames / (evidence.frames + theirs))
    try:
        table.check(own)
        table.tensors(own, activations)
    except NormStateError:  # statistics of a blind camera, say: what was released is still right
        return Composed(bare, refused=True)
    return Composed(ServingState(own, activations, version, domain.name, True, name), weight)


def base_state(releases: InForce, domain: Domain, table: NormTable) -> ServingState:
    """What a domain's images are measured behind: its base's affine parameters and activation scales, exported statistics."""
    base = releases.content(releases.base(domain.key))
    if base is None:
        return ServingState()
    return ServingState(on_exported_statistics(table, base.states), base.activations)


def on_exported_statistics(table: NormTable, states: Mapping[str, NormState]) -> dict[str, NormState]:
    """The states' affine parameters on the statistics of the export."""
    return {
        s.name: states[s.name].with_statistics(s.exported.mean, s.exported.variance)
        if s.kind.has_statistics
        else states[s.name]
        for s in table.norms
        if s.name in states
    }
