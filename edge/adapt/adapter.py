"""Adapter: what a device does about a shift on its own, forward only.

    every frame     features ─► shift detector ─► same domain / recall a known one / begin a new one
    kept images     measured together, once there are enough ─► evidence of the present domain ─► a state to serve
    releases        `propose` says what would be served were a set of them in force, `commit` makes it so

A new domain is served as exported, or with its release, until its first images are measured; then with their statistics, and
again when twice as many are known. Domain "d0", for which the bundle was exported, gets none. The adapter decides; it owns no
clock, thread, file, engine or release: releases in force are the updater's, and it is told of them.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge.adapt.bank import HOME, Domain, DomainBank
from edge.adapt.counters import Counters
from edge.adapt.evidence import Evidence
from edge.adapt.features import FEATURES, FrameFeatures, Reference
from edge.adapt.home import HomeReturn
from edge.adapt.proposal import Composed, Proposal, base_of, base_state, compose
from edge.adapt.report import statistics_report
from edge.adapt.schedule import KeepSchedule
from edge.adapt.settings import AdaptSettings
from edge.adapt.shift import ShiftDetector
from edge.adapt.support import AGREED, Change
from edge.serving import ServingState
from edge.statistics.estimate import Estimate
from edge.updates.inforce import Entry, InForce
from refold.errors import InputError
from refold.release import Release, digest, encode
from refold.statistics import StatisticsModel
from refold.v1 import samples_pb2 as pb

__all__ = ["Adapter"]

KEPT_REPORTS = 8  # reports waiting for the uplink; the oldest is dropped
LEARNED_REFERENCE = 48  # frames that stand in for a calibration slice where none is given
ENTROPY_RATE = 0.02
SUSPICION = 0.5  # of what would be an alarm
RETRY_FRAMES = 64  # frames until a state that could not be served is offered again


class Adapter:
    """One per engine. Not thread-safe: the caller serialises the calls.

    Args:
        model: the bundle's statistics model.
        settings: numbers.
        class_count: classes of the model; bounds entropy.
        reference: features of the calibration slice (`Reference.measure`). Without one the first frames are taken for home.
        bundle_digest: written into statistics reports.
    """

    def __init__(
        self,
        model: StatisticsModel,
        settings: AdaptSettings,
        class_count: int,
        *,
        reference: Reference | None = None,
        bundle_digest: str = "",
    ) -> None:
        self._model = model
        self._settings = settings
        self._class_count = class_count
        self._bundle_digest = bundle_digest
        self._schedule = KeepSchedule(settings)
        self._schedule.settle()
        self._releases = InForce()
        self._reports: deque[pb.StatisticsReport] = deque(maxlen=KEPT_REPORTS)
        self._learning: list[NDArray[np.float64]] | None = None if reference else []
        self._frame = 0
        self._entropy = 0.0
        self._counted = Counters()
        self._probe: list[NDArray[np.float64]] = []
        self._provisional = False
        self._residence = 0
        self._switch = False
        self._retry_at = 0
        self._weight = 0.0
        self._settle(reference or Reference.of(np.zeros((2, FEATURES))))

    def _settle(self, reference: Reference) -> None:
        self._detector = ShiftDetector(self._settings, reference)
        self._return = HomeReturn(reference, self._settings.shift_floor)
        self._bank = DomainBank(self._model.layout.channels, self._model.class_moments.count, reference, self._settings.domains)
        self._present = self._left = self._bank.home
        self._doubted: list[Domain] = []

    # Every frame -------------------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> AdaptSettings:
        return self._settings

    @property
    def model(self) -> StatisticsModel:
        return self._model

    @property
    def domain(self) -> str:
        """Name of the present domain."""
        return self._present.name

    @property
    def known_domains(self) -> tuple[str, ...]:
        """Names of the domains in the bank, the exported one included."""
        return tuple(domain.name for domain in self._bank)

    @property
    def reference(self) -> Reference:
        """How features look in the domain the bundle was exported for."""
        return self._detector.reference

    def wants_image(self, features: FrameFeatures) -> bool:
        """Takes one frame; True when its image is wanted (`edge.adapt.observer`)."""
        self._frame += 1
        self._entropy += max(ENTROPY_RATE, 1 / self._frame) * (features.entropy - self._entropy)
        if not self._settings.enabled:
            return False
        if self._learning is not None:
            return self._learn_home(features.values)
        if self._provisional or self._suspicious or self._frame % self._settings.watch_every == 0:
            self._watch(features.values)
        if self._switch and self._frame >= self._retry_at:
            return True
        return self._present.name != HOME and self._schedule.due()

    @property
    def _suspicious(self) -> bool:
        """Whether the next frames are watched one by one, so that a shift is noticed within a dozen of them."""
        return self._detector.pressure > SUSPICION or self._return.suspicious

    def _watch(self, values: NDArray[np.float64]) -> None:
        frames = 0.0 if self._provisional else self._detector.watch(values)
        if self._home_again(values):
            self._go_home()
        elif self._provisional:
            self._probe.append(values)
            if len(self._probe) >= self._settings.probe_frames:
                self._decide()
        elif frames:
            # Few frames may be chance, and the probe may find the old domain again; many frames know better than the probe.
            self._doubted = [self._present] if frames > self._settings.probe_frames else []
            self._begin(values)
        else:
            self._detector.learn(values)
            self._residence += 1
            if self._residence == self._settings.review_frames and self._present.name != HOME:
                self._review()

    def _home_again(self, values: NDArray[np.float64]) -> bool:
        """While frames after an alarm are collected, the detector still knows the domain that was left."""
        if (self._left if self._provisional else self._present).name == HOME:
            return False
        detector = self._detector
        return self._return.watch(values, detector.mean, detector.frames, detector.independent)

    def _go_home(self) -> None:
        self._leave()
        if self._provisional:
            self._bank.discard(self._present)
            self._provisional, self._probe = False, []
        self._residence = 0
        self._recall(self._bank.home)

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
        self._counted.shifts += 1
        self._provisional = True
        self._probe = [values]
        self._present = self._bank.new(values, 1.0)
        self._present.move(*base_of(self._releases, self._present), self._present.evidence, ())
        self._schedule.restart()

    def _leave(self) -> None:
        if not self._provisional:
            self._present.mean, self._present.frames = self._detector.mean.copy(), self._detector.frames

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
            self._recall(known, probe if known is self._left else None)
            return
        newcomer.mean, newcomer.frames = mean, frames
        self._bank.add(newcomer)
        self._detector.restart(mean, frames)
        self._return.restart(self._bank.home.mean)

    def _review(self) -> None:
        """A domain begun on few frames may turn out to be one that was known: then it is joined to that one."""
        newcomer = self._present
        mean, frames = self._detector.mean, self._detector.frames
        known = self._bank.like(mean, frames, self._detector.reference, self._settings.shift_floor, newcomer)
        if known is not None and self._releases.own(newcomer.key) is None:
            self._leave()
            self._bank.drop(newcomer)
            self._recall(known)

    def _recall(self, known: Domain, probe: Sequence[NDArray[np.float64]] | None = None) -> None:
        """Back to a known domain. `probe`: it was never left, so the slow averages go on, over the frames that showed it."""
        self._counted.recalls += 1
        self._switch = True
        self._present = known
        self._bank.touch(known)
        if known.name == HOME:
            self._schedule.settle()
        else:
            self._schedule.restart(known.evidence.frames)
        self._return.restart(self._bank.home.mean)
        if probe is None:
            self._detector.restart(known.mean, known.frames)
        for values in probe or ():
            self._detector.watch(values)

    # Kept images -------------------------------------------------------------------------------------------------------------

    def recalled(self, served: ServingState) -> ServingState | None:
        """A state that needs no measurement: of a domain that is known again. None: `served` goes on."""
        self._counted.images_kept += 1
        return self._offer(served) if self._switch else None

    def wants_measured(self, kept: int, limit: int) -> bool:
        """Whether so many kept images of the present domain, of at most `limit`, are to be measured now.

        The first time that is early, then whenever there are twice as many, and when they are complete.
        """
        if self._provisional or self._present.name == HOME or not self._settings.enabled:
            return False
        first = min(self._settings.first_images, limit)
        if self._present.whole is not None:
            first *= 2  # what is known already is at least as good as so few
        return kept == limit or (kept >= first and kept % first == 0 and (kept // first).bit_count() == 1)

    def skipped(self) -> None:
        """Counts a set of images that are too much alike to say anything."""
        self._counted.skipped += 1

    def blinded(self) -> None:
        """Counts an image that shows nothing."""
        self._counted.images_blind += 1

    @property
    def known(self) -> Evidence | None:
        """What earlier sets of images of the present domain showed, for the next one to be added to."""
        whole, most = self._present.whole, self._settings.evidence_frames
        return whole.worth(most) if whole is not None else None

    @property
    def base(self) -> ServingState:
        """What images of the present domain are measured behind."""
        return base_state(self._releases, self._present, self._model.layout.table)

    def candidate(self, found: Estimate) -> tuple[ServingState, ServingState] | None:
        """The present domain's state without and with what was found, where only agreement of the images can tell whether to
        serve it; else None. Pure.
        """
        self._check(found)
        without = self._composed(self._releases, self._present, Evidence(self._model.layout.channels, len(found.mix)))
        found_here = Evidence.of(found.moments, found.frames, found.mix, AGREED)
        behind = self._composed(self._releases, self._present, found_here)
        return (without.serving, behind.serving) if behind.serving.overlay else None

    def _check(self, found: Estimate) -> None:
        if found.moments.shape != (2, self._model.layout.channels) or not np.isfinite(found.moments).all():
            raise InputError(
                f"Moments of shape {found.moments.shape} are not this bundle's, or not finite: the images are not counted.",
                code="moments",
            )

    def measured(
        self, found: Estimate, frames: tuple[int, int], fresh: int, served: ServingState, *, change: Change, whole: bool
    ) -> ServingState | None:
        """Takes what the kept images of the present domain show; a state to serve from now on, or None to go on as before.

        Args:
            frames: numbers of the first and the last frame among them.
            fresh: how many of them no report has counted yet.
            served: the present state.
            change: of these images' answers, from the first to the second state of `candidate`.
            whole: the set is complete, and the next one is added to it.

        Raises:
            InputError: moments of another model, or not finite.
        """
        self._check(found)
        present = self._present
        self._counted.measured += 1
        if (known := self.known) is not None:
            change = change.beside(known.change, known.frames / found.frames)
        present.evidence = Evidence.of(found.moments, found.frames, found.mix, change)
        if whole:
            present.whole = present.evidence
        if fresh:
            self._reports.append(
                statistics_report(
                    self._model.layout,
                    found,
                    bundle_digest=self._bundle_digest,
                    release_version=served.release_version,
                    domain=present.name,
                    fresh=fresh,
                    frames=frames,
                )
            )
        return self._offer(served)

    def _offer(self, served: ServingState) -> ServingState | None:
        """The present domain's state unless it is what is served."""
        self._switch = False
        state = self._serving()
        same = (state.overlay, state.release_digest) == (served.overlay, served.release_digest)
        return None if same and not state.overlay else state

    def dropped(self, state: ServingState, served: ServingState) -> None:
        """The state offered last could not be served, `served` goes on: it is offered again, but not at the very next frame."""
        if (state.domain, state.release_digest) != (served.domain, served.release_digest):
            self._switch = True
            self._retry_at = self._frame + RETRY_FRAMES

    def _serving(self) -> ServingState:
        return self._take(self._composed(self._releases, self._present, self._present.evidence))

    def _composed(self, releases: InForce, domain: Domain, evidence: Evidence) -> Composed:
        return compose(releases, domain, evidence, self._model, self._settings)

    def _take(self, composed: Composed) -> ServingState:
        self._weight = composed.weight
        self._counted.overlays_refused += composed.refused
        self._counted.overlays_unsupported += composed.unsupported
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
            self._schedule.restart()
        if offered:
            self._switch = False
            self._take(proposal.composed)

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

    def take_statistics(self) -> pb.StatisticsReport | None:
        """The oldest report not yet taken: moments of `frames` images of one domain, no image counted twice."""
        return self._reports.popleft() if self._reports else None

    def metrics(self) -> dict[str, float]:
        """Counters and gauges for a heartbeat."""
        return {
            **self._counted.metrics(),
            "domains": float(len(self._bank)),
            "overlay_weight": self._weight,
            "agreement_gain": self._present.evidence.change.agreement,
            "diversity_gain": self._present.evidence.change.diversity,
            "evidence_frames": self._present.evidence.frames,
            "shift_distance": self._detector.distance,
            "entropy": self._entropy,
            "entropy_share": self._entropy / float(np.log(max(self._class_count, 2))),
        }

    def _fingerprint(self) -> str:
        names = ";".join(f"{s.name}:{s.channels}" for s in self._model.layout.sites)
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
        model: StatisticsModel,
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
        adapter = cls(model, settings, class_count, reference=reference, bundle_digest=bundle_digest)
        adapter._bank.restore(content, adapter._fingerprint())
        adapter._present = adapter._left = adapter._bank.home
        adapter._detector.restart(adapter._present.mean, adapter._present.frames)
        return adapter
