"""The release gate: a candidate runs in the very engine the device runs, on pictures its training never saw.

    admissible    the norm table takes every state (`refold.norms.check_state`) and no bias overflows
    agreement     with the teacher's argmax on held-back uploads must rise against what devices serve now; where the
                  change is within chance, the cross-entropy against the teacher's probabilities must fall
    clean         accuracy on the calibration slice may fall by `clean_points`
    collapse      the entropy of the predicted classes may not fall below a share of the teacher's

"What devices serve now" is the domain's newest release, else what a device makes of the exported state by itself: its overlay
of the domain's statistics (docs/adr/005-gate.md).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cloud.lesson import Candidate
from cloud.settings import GateSettings
from edge.adapt import AdaptSettings
from edge.adapt.evidence import Evidence, TapLayout
from edge.adapt.overlay import mixed_states
from edge.engine import EngineFactory
from edge.serving import ServingState
from refold.bundle import Bundle
from refold.errors import BundleError, NormStateError
from refold.norms import ActivationScale, NormState
from refold.release import Release
from refold.v1 import samples_pb2 as pb

__all__ = ["HOME", "Gate", "GateResult", "Scores", "verdict"]

F32 = NDArray[np.float32]
HOME = "d0"  # the domain a bundle was exported for; "" is a release for all domains
BATCH = 64
LEAST = 1e-6  # probability below which a cross-entropy no longer grows


@dataclass(frozen=True)
class GateResult:
    """`reasons`: what was wrong, or the one line that says why it passed."""

    passed: bool
    reasons: tuple[str, ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Scores:
    """One engine on the held-back pictures, against the teacher.

    Attributes:
        agreement: share of equal argmax, 0..1.
        cross_entropy: mean over pictures, nats, teacher's probabilities against the engine's.
        class_entropy: entropy of the histogram of predicted classes, nats.
        agrees: bool (N,), picture by picture.
    """

    agreement: float
    cross_entropy: float
    class_entropy: float
    agrees: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_), compare=False, repr=False)

    @classmethod
    def of(cls, logits: F32, teacher: F32) -> Scores:
        """logits and teacher probabilities, float32 (N, classes), N at least 1."""
        shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        predicted = logits.argmax(1)
        agrees = predicted == teacher.argmax(1)
        return cls(
            float(agrees.mean()),
            float(-(teacher * np.maximum(log_p, np.log(LEAST))).sum(1).mean()),
            histogram_entropy(predicted, logits.shape[1]),
            agrees,
        )

    def chance(self, other: Scores) -> float:
        """Standard error of the difference of two agreements on the same pictures, 0..1: the root of how many changed sides."""
        changed = int((self.agrees != other.agrees).sum())
        return float(np.sqrt(changed)) / max(len(self.agrees), 1)


def histogram_entropy(classes: NDArray[np.integer], count: int) -> float:
    """Entropy in nats of the shares of `count` classes."""
    shares = np.bincount(classes, minlength=count) / max(len(classes), 1)
    return float(-(shares * np.log(np.where(shares > 0, shares, 1.0))).sum())


class Gate:
    """Judges candidates for one bundle; engines and the calibration slice are opened once."""

    def __init__(self, bundle: Bundle, settings: GateSettings, *, threads: int = 1) -> None:
        self._bundle, self._settings = bundle, settings
        self._factory = EngineFactory(bundle, threads=threads)
        self._layout = TapLayout(bundle.norms)
        self._images, self._labels = _calibration(bundle)
        exported = self._logits(ServingState(), self._images)
        self._known_labels, self._exported = self._labels, exported
        if self._labels is None and len(self._images):
            self._labels = exported.argmax(1)
        self._clean = self._accuracy(exported)

    @property
    def calibration(self) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None, F32]:
        """Images uint8 (N, height, width, 3), labels int64 (N,) or None, the exported engine's logits float32 (N, classes)."""
        labels = None if self._known_labels is None else self._known_labels.astype(np.int64)
        return self._images, labels, self._exported

    def judge(
        self,
        candidate: Candidate,
        current: Release | None,
        held_back: NDArray[np.uint8],
        teacher: F32 | None,
        reports: Sequence[pb.StatisticsReport] = (),
    ) -> GateResult:
        """Runs the candidate.

        Args:
            current: the newest release that devices serve in the candidate's domain.
            held_back: pictures of that domain that were not trained on: uint8 (N, height, width, 3).
            teacher: probabilities float32 (N, classes); None without a teacher, and then agreement is not judged.
            reports: the domain's statistics, for the overlay a device without a release serves.
        """
        states, activations = dict(candidate.states), tuple(candidate.activations)
        try:
            self._bundle.norms.check(states)
            serving = ServingState(states, activations, 0, candidate.domain)
            self._factory.canary(self._factory.build(serving))
        except NormStateError as e:
            return GateResult(False, (f"not admissible: {e.message}",), {})
        metrics: dict[str, float] = {"clean_accuracy_exported": self._clean}
        faults = self._clean_faults(candidate, states, activations, metrics)
        if teacher is not None and len(held_back):
            new = Scores.of(self._logits(serving, held_back), teacher)
            old = Scores.of(self._logits(self._alone(current, candidate.domain, reports), held_back), teacher)
            metrics |= _named(new, old, len(held_back))
            spread = histogram_entropy(teacher.argmax(1), teacher.shape[1])
            faults += verdict(new, old, spread, self._settings)
        if faults:
            return GateResult(False, tuple(faults), metrics)
        return GateResult(True, (_praise(metrics),), metrics)

    def _clean_faults(
        self,
        candidate: Candidate,
        states: Mapping[str, NormState],
        activations: tuple[ActivationScale, ...],
        metrics: dict[str, float],
    ) -> list[str]:
        home = candidate.domain in ("", HOME)
        if not home:  # its affine parameters on the statistics they would meet at home
            states = {n: _on_exported_statistics(self._bundle, n, s) for n, s in states.items()}
        try:
            self._bundle.norms.check(states)
            accuracy = self._accuracy(self._logits(ServingState(states, activations), self._images))
        except NormStateError as e:
            return [f"not admissible on the exported statistics: {e.message}"]
        metrics["clean_accuracy"] = accuracy
        allowed = self._settings.clean_points if home else self._settings.shifted_clean_points
        fall = 100 * (self._clean - accuracy)
        if len(self._images) and fall > allowed:
            return [f"clean accuracy falls by {fall:.1f} points to {100 * accuracy:.1f} % ({allowed:g} are allowed)"]
        return []

    def _alone(self, current: Release | None, domain: str, reports: Sequence[pb.StatisticsReport]) -> ServingState:
        """What a device serves in this domain without the candidate."""
        if current is not None and current.domain == domain:
            return ServingState.of(current)
        states = dict(current.states) if current else {}
        activations = current.activations if current else ()
        evidence = self._evidence(reports)
        if domain in ("", HOME) or not evidence.frames:
            return ServingState(states, activations)
        habits = AdaptSettings()
        weight = habits.mix * evidence.frames / (evidence.frames + habits.prior_frames)
        return ServingState(mixed_states(self._layout, states, evidence, weight, self._bundle.norms.trust_ratio), activations)

    def _evidence(self, reports: Sequence[pb.StatisticsReport]) -> Evidence:
        evidence = Evidence(self._layout.channels)
        for report in reports:
            sites = {s.site: s for s in report.sites}
            moments = np.zeros((2, self._layout.channels))
            for site, cut in zip(self._layout.sites, self._layout.slices, strict=True):
                found = sites.get(site.name)
                if found is None or len(found.mean) != site.channels:
                    break
                moments[0, cut] = found.mean
                moments[1, cut] = np.asarray(found.variance) + np.asarray(found.mean) ** 2
            else:
                evidence.add(moments, frames=float(report.frames))
        return evidence

    def _logits(self, serving: ServingState, images: NDArray[np.uint8]) -> F32:
        engine = self._factory.build(serving)
        parts = [engine.run(self._bundle.preprocess.apply(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
        return np.concatenate(parts) if parts else np.zeros((0, self._bundle.manifest.class_count), np.float32)

    def _accuracy(self, logits: F32) -> float:
        return float((logits.argmax(1) == self._labels).mean()) if len(logits) else 1.0


def verdict(new: Scores, old: Scores, teacher_spread: float, settings: GateSettings) -> list[str]:
    """Pure: what speaks against a candidate, given its scores, those of what is served now, and the teacher's class entropy."""
    faults = []
    rise = 100 * (new.agreement - old.agreement)
    least = settings.agreement_points
    tolerated = 100 * settings.standard_errors * new.chance(old) + 1e-9  # shares of pictures are not exact in binary
    undecided = least <= 0 and rise >= min(least, -tolerated)
    if not (rise > least or (undecided and new.cross_entropy < old.cross_entropy)):
        faults.append(
            f"agreement with the teacher does not rise: {100 * old.agreement:.1f} % to {100 * new.agreement:.1f} %, "
            f"cross-entropy {old.cross_entropy:.3f} to {new.cross_entropy:.3f}"
        )
    if new.class_entropy < settings.entropy_share * teacher_spread and new.class_entropy < old.class_entropy:
        faults.append(
            f"predictions collapse to few classes: entropy {new.class_entropy:.2f} where the teacher's is {teacher_spread:.2f}"
        )
    return faults


def _named(new: Scores, old: Scores, count: int) -> dict[str, float]:
    return {
        "held_back": float(count),
        "agreement": new.agreement,
        "agreement_before": old.agreement,
        "cross_entropy": new.cross_entropy,
        "cross_entropy_before": old.cross_entropy,
        "class_entropy": new.class_entropy,
    }


def _praise(metrics: Mapping[str, float]) -> str:
    clean = f"clean {100 * metrics['clean_accuracy_exported']:.1f} % to {100 * metrics['clean_accuracy']:.1f} %"
    if "agreement" not in metrics:
        return f"passed without a teacher: {clean}"
    return (
        f"agreement {100 * metrics['agreement_before']:.1f} % to {100 * metrics['agreement']:.1f} % "
        f"on {metrics['held_back']:.0f} held back; {clean}"
    )


def _on_exported_statistics(bundle: Bundle, name: str, state: NormState) -> NormState:
    exported = bundle.norms.site(name).exported
    return state.with_statistics(exported.mean, exported.variance)


def _calibration(bundle: Bundle) -> tuple[NDArray[np.uint8], NDArray[np.integer] | None]:
    """(images uint8 (N, height, width, 3), labels (N,) or None where unknown)."""
    if not bundle.manifest.calibration:
        pre = bundle.preprocess
        return np.zeros((0, pre.height, pre.width, 3), np.uint8), None
    try:
        with np.load(io.BytesIO(bundle.read(bundle.manifest.calibration)), allow_pickle=False) as archive:
            images = np.asarray(archive["images"], np.uint8)
            labels = np.asarray(archive["labels"]) if "labels" in archive.files else None
    except (ValueError, KeyError, OSError) as e:
        raise BundleError(f"The calibration slice of {bundle.path} is damaged: export it again.", code="damaged") from e
    known = labels is not None and labels.shape == (len(images),) and bool((labels >= 0).all())
    return images, labels if known else None
