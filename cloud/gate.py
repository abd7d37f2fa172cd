"""The release gate: a candidate runs in the very engine the device runs, on images its training never saw.

    admissible    the norm table takes every state (`refold.norms.check_state`) and no bias overflows
    held out      against what devices serve now, by the teacher's probabilities: cloud/gating/verdict.py
    clean         on the calibration images, what clean frames lose while this state serves them
    collapse      the entropy of the predicted classes may not fall below a share of the teacher's

"What devices serve now" is the domain's newest release, else what a device makes of the exported state by itself: local BN
statistics of the domain, measured here as the device measures them. Evidence that is missing never speaks for a candidate
(docs/adr/005-gate.md).
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from cloud.gating.comparison import Scores
from cloud.gating.verdict import GateResult, clean_fault, missing_evidence, spread_of, verdict
from cloud.lesson import Candidate
from cloud.settings import GateSettings
from cloud.training.answers import check_answers
from edge.adapt import AdaptSettings
from edge.adapt.proposal import on_exported_statistics
from edge.adapt.support import AGREED, change_of_answers, supported
from edge.engine import EngineFactory
from edge.serving import ServingState
from edge.statistics import estimate, measure_of
from refold.bundle import Bundle
from refold.errors import BundleError, ModelError, NormStateError
from refold.norms import NormState
from refold.release import Release
from refold.statistics import StatisticsModel

__all__ = ["HOME", "Gate"]

F32 = NDArray[np.float32]
HOME = "d0"  # the domain a bundle was exported for; "" is a release for all domains
BATCH = 64
SAME = 1e-4  # standard deviation of probabilities below which a teacher answers the same to every image
# Share of the labelled image. At 0.8 ResNet-20 is right on 94.7 % of images it memorised; of unseen ones, not mixed, on 92.7 %.
MIXES = (0.9, 0.8)


class Gate:
    """Judges candidates for one bundle; engines and the calibration slice are opened once."""

    def __init__(self, bundle: Bundle, settings: GateSettings, *, threads: int = 1) -> None:
        self._bundle, self._settings = bundle, settings
        self._factory = EngineFactory(bundle, threads=threads)
        self._habits = AdaptSettings()
        self._model = StatisticsModel.of(bundle, self._habits.mix)
        self._measure = measure_of(self._factory, self._model, self._habits.memory_mb)
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
        population: NDArray[np.uint8] | None = None,
    ) -> GateResult:
        """Runs the candidate.

        Args:
            current: the newest release that devices serve in the candidate's domain.
            held_back: images of that domain that were not trained on: uint8 (N, height, width, 3).
            teacher: probabilities float32 (N, classes); None without a teacher, and then nothing is released.
            population: images of the domain chosen at random, for the overlay a device without a release serves; the held-out
                ones where left out.
        """
        serving = ServingState(dict(candidate.states), tuple(candidate.activations), 0, candidate.domain)
        try:
            self._bundle.norms.check(serving.states)
            self._factory.canary(self._factory.build(serving))
        except NormStateError as e:
            return GateResult.refused(f"not admissible: {e.message}")
        if not len(self._images):
            return GateResult.refused(
                "the bundle carries no calibration images: what clean images would lose is not known; export it with some"
            )
        alone = self._alone(current, candidate.domain, held_back if population is None else population)
        metrics: dict[str, float] = {"clean_accuracy_exported": self._clean}
        fault = self._clean_fault(candidate.domain, serving, alone, metrics)
        if fault:
            return GateResult.refused(fault, metrics=metrics)
        result = self._on_held_out(serving, self._served(current, candidate.domain, alone), held_back, teacher)
        reasons = result.reasons if not result.passed else (f"{result.reasons[0]}; {_clean_words(metrics)}",)
        return GateResult(result.finding, reasons, {**metrics, **result.metrics})

    def _on_held_out(
        self, serving: ServingState, served: ServingState, images: NDArray[np.uint8], teacher: F32 | None
    ) -> GateResult:
        missing = missing_evidence(len(images), teacher, len(teacher) if teacher is not None else 0, self._settings)
        if missing is not None or teacher is None:
            return missing or GateResult.refused("there is no teacher")
        try:
            check_answers(teacher, len(images), int(self._bundle.manifest.class_count), "of this bundle")
        except ModelError as e:
            return GateResult.refused(e.message)
        before, after = self._logits(served, images), self._logits(serving, images)
        if not (np.isfinite(before).all() and np.isfinite(after).all()):
            return GateResult.refused("the engine answers values that are not finite")
        if len(images) > 1 and float(teacher.std(0).max()) < SAME and len(np.unique(before.argmax(1))) > 1:
            return GateResult.refused("the teacher answers the same whatever it is shown: its opinion is worth nothing")
        return verdict(Scores.of(after, teacher), Scores.of(before, teacher), spread_of(teacher), self._settings)

    def _clean_fault(self, domain: str, serving: ServingState, alone: ServingState, metrics: dict[str, float]) -> str:
        """What clean images lose by the candidate, against what would serve them without it.

        A release for home, or for all domains, serves clean images all day: calibration images are compared as they are and
        mixed with others, where memory of them is of little help. A shifted domain's state meets clean images only until the
        device notices that the shift is over; there it is compared with what the device alone would serve meanwhile, and may
        lose a share of what that loses. Where it loses more, its statistics may be to blame, which go further than a device's
        own and never stay: then gamma and beta are judged on the exported statistics.
        """
        allowed = self._settings.shifted_clean_points
        if domain in ("", HOME):
            images, labels = self._mixed()
            right = [self._logits(state, images).argmax(1) == labels for state in (ServingState(), serving)]
            # Against the export, not against the last release: half a point at a time is a fall, too.
            return self._clean_compared(right[0], right[1], self._settings.clean_points, metrics, strict=True)
        before, after = (self._logits(state, self._images).argmax(1) == self._labels for state in (alone, serving))
        lost = 100 * (self._clean - float(before.mean()))  # by the overlay alone: what a shift's end costs anyhow
        fault = self._clean_compared(before, after, max(allowed, self._settings.shifted_clean_share * lost), metrics)
        if not fault:
            return ""
        states = {n: _on_exported_statistics(self._bundle, n, s) for n, s in serving.states.items()}
        try:
            self._bundle.norms.check(states)
            bare = self._logits(ServingState(states, serving.activations), self._images).argmax(1) == self._labels
        except NormStateError:
            return fault
        other = self._clean_compared(self._exported.argmax(1) == self._labels, bare, allowed, metrics)
        return f"{fault} against the device alone; gamma and beta on the exported statistics: {other}" if other else ""

    @staticmethod
    def _clean_compared(
        before: NDArray[np.bool_], after: NDArray[np.bool_], allowed: float, metrics: dict[str, float], *, strict: bool = False
    ) -> str:
        metrics["clean_accuracy_before"], metrics["clean_accuracy"] = float(before.mean()), float(after.mean())
        return clean_fault(after, before, allowed, "clean accuracy", strict=strict)

    def _mixed(self) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        """Every calibration image, and mixed with some other one (mixup, Zhang et al. 2018) at each of `MIXES`."""
        x, order = self._images.astype(np.float32), np.random.default_rng(0).permutation(len(self._images))
        parts = [self._images]
        for i, share in enumerate(MIXES):
            other = np.roll(order, i + 1)[np.argsort(order)]
            parts.append(np.round(share * x + (1 - share) * x[other]).astype(np.uint8))
        assert self._labels is not None
        return np.concatenate(parts), np.tile(self._labels, len(parts))

    def _served(self, current: Release | None, domain: str, alone: ServingState) -> ServingState:
        """What a device serves in this domain without the candidate."""
        return ServingState.of(current) if current is not None and current.domain == domain else alone

    def _alone(self, current: Release | None, domain: str, population: NDArray[np.uint8]) -> ServingState:
        """What a device makes of the domain without a release of its own: local BN statistics, measured as a device does.

        Not from the devices' reports, which may have been measured behind other releases.
        """
        base = current if current is not None and not current.domain else None
        states, activations = dict(base.states) if base else {}, base.activations if base else ()
        start = ServingState(states, activations, 0, domain)
        if domain in ("", HOME) or self._measure is None or not len(population):
            return start
        bare = ServingState(on_exported_statistics(self._bundle.norms, states), activations)
        images = list(population[-self._habits.images :])
        found = estimate(self._measure, self._model, bare, images)
        shift = self._model.early(found.moments, found.frames, found.mix)
        if not supported(shift, AGREED):
            return start
        own, _ = self._model.served(bare.states, found.moments, found.frames, found.mix)
        alone = ServingState(own, activations, 0, domain, overlay=True)
        return alone if supported(shift, change_of_answers(self._measure, self._model, start, alone, images)) else start

    def _logits(self, serving: ServingState, images: NDArray[np.uint8]) -> F32:
        engine = self._factory.build(serving)
        parts = [engine.run(self._bundle.preprocess.apply(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
        return np.concatenate(parts) if parts else np.zeros((0, self._bundle.manifest.class_count), np.float32)

    def _accuracy(self, logits: F32) -> float:
        return float((logits.argmax(1) == self._labels).mean()) if len(logits) else 1.0


def _clean_words(metrics: Mapping[str, float]) -> str:
    return f"clean {100 * metrics['clean_accuracy_before']:.1f} % to {100 * metrics['clean_accuracy']:.1f} %"


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
