"""Adapter: what a device does about a shift on its own, forward only.

    every frame     features ─► shift detector ─► same domain / recall a known one / begin a new one
    tapped frames   moments of every norm's input ─► evidence of the present domain ─► overlay ─► a state to serve
    settling        the first frames of a new domain again, behind each new state, until their statistics stay
    releases        `propose` says what would be served were a set of them in force, `commit` makes it so

A state is offered when evidence has doubled, so an engine is rebuilt a handful of times per domain and not per frame.
Domain "d0", for which the bundle was exported, gets no overlay: plain statistics cost accuracy there. The adapter decides;
it owns no clock, thread, file, engine or release: releases in force are the updater's, and it is told of them.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge.adapt.bank import HOME, NEVER, Domain, DomainBank
from edge.adapt.evidence import Evidence, TapLayout
from edge.adapt.features import FEATURES, FrameFeatures, Reference
from edge.adapt.proposal import Composed, Proposal, base_of, compose
from edge.adapt.schedule import TapSchedule
from edge.adapt.settings import AdaptSettings
from edge.adapt.shift import ShiftDetector
from edge.serving import ServingState
from edge.updates.inforce import Entry, InForce
from refold.norms import NormTable
from refold.release import Release, digest, encode
from refold.v1 import adaptation_pb2  # noqa: F401  (registers the package's messages)
from refold.v1 import samples_pb2 as pb

__all__ = ["Adapter"]

MIN_REPORT = 8  # tapped frames of a domain that was left early: fewer are not worth a message
KEPT_REPORTS = 8  # reports waiting for the uplink; the oldest is dropped
LEARNED_REFERENCE = 48  # frames that stand in for a calibration slice where none is given
ENTROPY_RATE = 0.02
SETTLED = 0.01  # mean move of the observed means in one pass, in standard deviations of a norm's input, that ends settling
RETRY_FRAMES = 64  # frames until a state that could not be served is offered again


class Adapter:
    """One per engine. Not thread-safe: the caller serialises the calls.

    Args:
        table: the bundle's norm table.
        settings: numbers.
        class_count: classes of the model; bounds entropy.
        reference: features of the calibration slice (`Reference.measure`). Without one the first frames are taken for home.
        bundle_digest: written into statistics reports.
    """

    def __init__(
        self,
        table: NormTable,
        settings: AdaptSettings,
        class_count: int,
        *,
        reference: Reference | None = None,
        bundle_digest: str = "",
    ) -> None:
        self._table = table
        self._settings = settings
        self._class_count = class_count
        self._bundle_digest = bundle_digest
        self._layout = TapLayout(table)
        self._schedule = TapSchedule(settings)
        self._schedule.settle()
        self._releases = InForce()
        self._reports: deque[pb.StatisticsReport] = deque(maxlen=KEPT_REPORTS)
        self._learning: list[NDArray[np.float64]] | None = None if reference else []
        self._frame = 0
        self._entropy = 0.0
        self._taps = self._shifts = self._recalls = self._refused = 0
        self._probe: list[NDArray[np.float64]] = []
        self._provisional = False
        self._residence = 0
        self._switch = False
        self._retry_at = 0
        self._served_version = 0
        self._weight = 0.0
        self._passes = 0
        self._settle(reference or Reference.of(np.zeros((2, FEATURES))))

    def _settle(self, reference: Reference) -> None:
        self._detector = ShiftDetector(self._settings, reference)
        self._bank = DomainBank(self._layout.channels, reference, self._settings.domains)
        self._present = self._left = self._bank.home
        self._doubted: list[Domain] = []

    # Every frame -------------------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> AdaptSettings:
        return self._settings

    @property
    def domain(self) -> str:
        """Name of the present domain."""
        return self._present.name

    @property
    def known_domains(self) -> tuple[str, ...]:
        """Names of the domains in the bank, the exported one included."""
        return tuple(domain.name for domain in self._bank)

    def wants_taps(self, features: FrameFeatures) -> bool:
        """Takes one frame; True when its moments are wanted (`observe_taps`)."""
        self._frame += 1
        self._entropy += max(ENTROPY_RATE, 1 / self._frame) * (features.entropy - self._entropy)
        if not self._settings.enabled:
            return False
        if self._learning is not None:
            return self._learn_home(features.values)
        if self._provisional or self._frame % self._settings.watch_every == 0:
            self._watch(features.values)
        return self._schedule.due() or (self._switch and self._frame >= self._retry_at)

    def _watch(self, values: NDArray[np.float64]) -> None:
        if self._provisional:
            self._probe.append(values)
            if len(self._probe) >= self._settings.probe_frames:
                self._decide()
        elif frames := self._detector.watch(values):
            # Few frames may be chance, and the probe may find the old domain again; many frames know better than the probe.
            self._doubted = [self._present] if frames > self._settings.probe_frames else []
            self._begin(values)
        else:
            self._detector.learn(values)
            self._residence += 1
            if self._residence == self._settings.review_frames and self._present.name != HOME:
                self._review()

    def _learn_home(self, values: NDArray[np.float64]) -> bool:
        assert self._learning is not None
        self._learning.append(values)
        if len(self._learning) >= LEARNED_REFERENCE:
            self._settle(Reference.of(np.stack(self._learning)))
            self.commit(self.propose(self._releases), offered=False)
            self._learning = None
        return False

    def _begin(self, values: NDArray[np.float64]) -> None:
        """A shift: a provisional domain collects evidence while the next frames tell which domain it is."""
        self._leave()
        self._left = self._present
        self._shifts += 1
        self._provisional = True
        self._probe = [values]
        self._present = self._bank.new(values, 1.0)
        self._present.move(*base_of(self._releases, self._present), self._present.evidence, ())
        self._present.rebuild_at = self._settings.first_rebuild
        self._present.settle_at = self._settings.settle_from if self._settings.settle_passes else NEVER
        self._schedule.restart()

    def _leave(self) -> None:
        present = self._present
        self._passes = 0
        if not self._provisional:
            present.mean, present.frames = self._detector.mean.copy(), self._detector.frames
        if present.unreported.frames >= MIN_REPORT:
            self._report(present)
        present.unreported = Evidence(self._layout.channels)

    def _decide(self) -> None:
        """Enough frames after the alarm: a known domain is recalled, a new one is remembered."""
        mean = np.mean(self._probe, axis=0)
        frames = float(len(self._probe))
        newcomer = self._present
        known = self._bank.like(mean, frames, self._detector.reference, self._settings.shift_floor, *self._doubted)
        probe, self._probe = self._probe, []
        self._provisional = False
        self._residence = 0
        if known is not None:
            self._bank.discard(newcomer)
            self._recall(known, newcomer.evidence, probe if known is self._left else None)
            return
        newcomer.mean, newcomer.frames = mean, frames
        self._bank.add(newcomer)
        self._detector.restart(mean, frames)

    def _review(self) -> None:
        """A domain begun on few frames may turn out to be one that was known: then it is joined to that one."""
        newcomer = self._present
        mean, frames = self._detector.mean, self._detector.frames
        known = self._bank.like(mean, frames, self._detector.reference, self._settings.shift_floor, newcomer)
        if known is not None and self._releases.own(newcomer.key) is None:
            self._leave()
            self._bank.drop(newcomer)
            self._recall(known, newcomer.evidence)

    def _recall(self, known: Domain, fresh: Evidence, probe: Sequence[NDArray[np.float64]] | None = None) -> None:
        """Back to a known domain. `probe`: it was never left, so the slow averages go on, over the frames that showed it."""
        self._recalls += 1
        self._switch = True
        self._present = known
        self._bank.touch(known)
        if known.name == HOME:
            self._schedule.settle()
        else:
            known.evidence.fade(self._settings.staleness)
            if fresh.frames:
                known.evidence.add(fresh.moments, frames=fresh.frames)
            self._schedule.restart(known.evidence.frames)
        if probe is None:
            self._detector.restart(known.mean, known.frames)
        for values in probe or ():
            self._detector.watch(values)

    # Tapped frames -----------------------------------------------------------------------------------------------------------

    def observe_taps(self, frame: int, moments: NDArray[np.float32], served: ServingState) -> ServingState | None:
        """Takes the tap model's output for one frame; a state to serve from now on, or None to go on as before.

        Args:
            frame: the frame's number, for reports.
            moments: float32 (2, channels).
            served: what the tap model ran with.

        Raises:
            InputError: the moments do not fit the bundle or are not finite.
        """
        seen = self._layout.unfold(moments, served.states)
        self._taps += 1
        present = self._present
        present.evidence.add(seen, limit=self._settings.evidence_frames)
        present.taps += 1
        if not present.unreported.frames:
            present.first_frame = frame
        present.unreported.add(seen)
        present.last_frame = frame
        self._served_version = served.release_version
        if present.unreported.frames >= self._settings.report_frames and not self._provisional:
            self._report(present)
            present.unreported = Evidence(self._layout.channels)
        due = present.name != HOME and present.taps >= present.rebuild_at
        if not (due or self._switch):
            return None
        return self._offer()

    def _offer(self) -> ServingState:
        serving = self._serving()
        self._offered()
        return serving

    def _offered(self) -> None:
        """A state was handed out: the next one is due when the evidence has grown."""
        present = self._present
        self._switch = False
        wait = max(present.taps, self._settings.first_rebuild)
        if present.taps < self._settings.burst:
            wait = min(wait, self._settings.rebuild_step)
        present.rebuild_at = present.taps + wait
        if present.name != HOME:
            present.evidence.fade(self._settings.staleness)

    def dropped(self, state: ServingState, served: ServingState) -> None:
        """The state offered last could not be served, `served` goes on: it is offered again, but not at the very next frame."""
        if (state.domain, state.release_digest) != (served.domain, served.release_digest):
            self._switch = True
            self._retry_at = self._frame + RETRY_FRAMES

    @property
    def settling(self) -> bool:
        """Whether the frames tapped now will be wanted again."""
        return self._present.settle_at != NEVER

    def wants_settled(self, frames: int) -> bool:
        """Asked when a state was just offered: whether `settle` wants so many kept frames tapped behind it."""
        if self._passes:
            return True
        present = self._present
        if not self.settling or present.taps < present.settle_at or frames < min(present.taps, self._settings.burst):
            return False
        present.settle_at = min(2 * present.settle_at, self._settings.burst) if present.taps < self._settings.burst else NEVER
        self._passes = self._settings.settle_passes
        return True

    def settle(self, moments: NDArray[np.float32], frames: int, served: ServingState) -> ServingState:
        """Takes the mean moments of the domain's kept frames behind `served` as its evidence; a better state to serve.

        Args:
            moments: float32 (2, channels).
            frames: how many they were.
            served: what the tap model ran with, this adapter's latest offer.
        """
        evidence = self._present.evidence
        seen = self._layout.unfold(moments, served.states)
        spread = np.sqrt(np.maximum(seen[1] - seen[0] ** 2, 1e-12))
        moved = float(np.mean(np.abs(seen[0] - evidence.mean) / spread))
        evidence.moments, evidence.frames = seen, float(frames)
        self._passes = self._passes - 1 if moved > SETTLED else 0
        return self._serving()

    def _serving(self) -> ServingState:
        return self._take(self._composed(self._releases, self._present, self._present.evidence))

    def _composed(self, releases: InForce, domain: Domain, evidence: Evidence) -> Composed:
        return compose(releases, domain, evidence, self._layout, self._table, self._settings)

    def _take(self, composed: Composed) -> ServingState:
        self._weight = composed.weight
        self._refused += composed.refused
        return composed.serving

    # Releases ----------------------------------------------------------------------------------------------------------------

    @property
    def releases(self) -> InForce:
        """The releases in force, as they were last committed."""
        return self._releases

    def key_of(self, domain: str) -> str:
        """Key of the domain a release names; "" when this device has not met it: the release then serves nothing here.

        A release without a domain is the base of every domain that has none of its own; it needs no key.
        """
        if domain == self._present.name:
            return self._present.key
        known = self._bank.get(domain)
        return known.key if known else ""

    def propose(self, releases: InForce) -> Proposal:
        """Pure: what would be served, and how every domain would stand, were these releases in force."""
        moves = []
        for domain in dict.fromkeys((*self._bank, self._left, self._present)):
            base, shared = base_of(releases, domain)
            moves.append((domain, base, shared, domain.behind(base, shared)))
        present = self._present
        base, shared, evidence = next(m[1:] for m in moves if m[0] is present)
        moved = base != present.base
        afresh = moved and not shared and base not in present.past
        return Proposal(releases, present, self._composed(releases, present, evidence), moved, afresh, tuple(moves))

    def commit(self, proposal: Proposal, *, offered: bool) -> None:
        """Makes a proposal so; nothing may have happened in between. `offered`: its state is served from now on."""
        assert proposal.present is self._present
        self._releases = proposal.releases
        kept = proposal.releases.digests | {""}
        for domain, base, shared, evidence in proposal.moves:
            domain.move(base, shared, evidence, kept)
        if proposal.afresh:
            self._schedule.restart(share=0.5)
        if offered:
            self._take(proposal.composed)
            self._offered()

    def on_release(self, release: Release) -> ServingState | None:
        """Takes in an admitted release at once, for simulations without a disk; a state to serve when it concerns the present
        domain, else None.
        """
        entry = Entry(release.version, release.domain, digest(encode(release)), self.key_of(release.domain))
        proposal = self.propose(self._releases.ordered(entry, release))
        self.commit(proposal, offered=proposal.moved)
        return proposal.serving if proposal.moved else None

    def on_rollback(self, release: Release | None) -> ServingState:
        """Forgets every release newer than `release` (None: all of them) at once; the state to serve from now on."""
        wanted = InForce()
        if release is not None:
            entry = Entry(release.version, release.domain, digest(encode(release)), self.key_of(release.domain))
            wanted = self._releases.ordered(entry, release)
        proposal = self.propose(wanted)
        self.commit(proposal, offered=True)
        return proposal.serving

    # Reports and memory ------------------------------------------------------------------------------------------------------

    def _report(self, domain: Domain) -> None:
        evidence = domain.unreported
        report = pb.StatisticsReport(
            bundle_digest=self._bundle_digest,
            release_version=self._served_version,
            domain=domain.name,
            frames=round(evidence.frames),
            first_frame=domain.first_frame,
            last_frame=domain.last_frame,
        )
        digest = hashlib.sha256()
        for site, cut in zip(self._layout.sites, self._layout.slices, strict=True):
            mean = evidence.mean[cut].astype("<f4")
            variance = evidence.variance[cut].astype("<f4")
            digest.update(site.name.encode() + b"\0" + mean.tobytes() + variance.tobytes())
            report.sites.add(site=site.name, mean=mean.tolist(), variance=variance.tolist())
        report.digest = digest.hexdigest()
        self._reports.append(report)

    def take_statistics(self) -> pb.StatisticsReport | None:
        """The oldest report not yet taken: moments of `frames` tapped frames of one domain, no frame counted twice."""
        return self._reports.popleft() if self._reports else None

    def metrics(self) -> dict[str, float]:
        """Counters and gauges for a heartbeat."""
        return {
            "domains": float(len(self._bank)),
            "shifts": float(self._shifts),
            "recalls": float(self._recalls),
            "taps": float(self._taps),
            "overlay_weight": self._weight,
            "overlays_refused": float(self._refused),
            "evidence_frames": self._present.evidence.frames,
            "shift_distance": self._detector.distance,
            "entropy": self._entropy,
            "entropy_share": self._entropy / float(np.log(max(self._class_count, 2))),
        }

    def _fingerprint(self) -> str:
        names = ";".join(f"{s.name}:{s.channels}" for s in self._layout.sites)
        return hashlib.sha256(names.encode()).hexdigest()

    def dump(self) -> bytes:
        """The domain bank as bytes, to be kept across restarts."""
        if not self._provisional:
            self._present.mean, self._present.frames = self._detector.mean.copy(), self._detector.frames
        return self._bank.dump(self._fingerprint())

    @classmethod
    def load(
        cls,
        content: bytes,
        table: NormTable,
        settings: AdaptSettings,
        class_count: int,
        *,
        reference: Reference | None = None,
        bundle_digest: str = "",
    ) -> Adapter:
        """An adapter with the bank that `dump` gave; it starts at home, and as exported until it is told what is in force.

        Raises:
            StorageError: the bytes are damaged or belong to another bundle.
        """
        adapter = cls(table, settings, class_count, reference=reference, bundle_digest=bundle_digest)
        adapter._bank.restore(content, adapter._fingerprint())
        adapter._present = adapter._left = adapter._bank.home
        adapter._detector.restart(adapter._present.mean, adapter._present.frames)
        return adapter
