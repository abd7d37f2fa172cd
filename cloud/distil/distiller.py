"""Distiller: uploads and statistics of one cohort in, candidate norm states out.

    samples, reports ─► DomainEvidence ─► ready()
    train(domain):  teachers adapt to the domain's population ─► a recipe moves gamma and beta through the integers
                    ─► statistics measured behind them ─► Candidate, inside the trust region

Everything is determined by the settings' seed and by what was added in which order, so a restarted worker that adds the stored
samples again stands where it stood.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from cloud.distil.cema import CemaLoop
from cloud.distil.corrections import CorrectedTeachers
from cloud.distil.norm_mode import Moments
from cloud.distil.recipe import Calibration, Task, convincing, cross_entropies, learn, lessons
from cloud.distil.samples import DomainEvidence
from cloud.distil.settings import DistilSettings
from cloud.distil.student import Student
from cloud.distil.teachers import Teachers
from cloud.training.loop import run_strategy
from cloud.training.strategies.registry import CEMA_LOOPS
from refold.bundle import Bundle
from refold.errors import UsageError
from refold.norms import ActivationScale, NormState
from refold.v1 import samples_pb2 as pb

__all__ = ["Candidate", "Distiller"]

U8 = NDArray[np.uint8]
COMPARED = 256  # newest uploads on which mixing shares are compared


@dataclass(frozen=True)
class Candidate:
    """What a training proposes; the gate judges it.

    Attributes:
        states: every site, admissible by `NormTable.check`.
        samples: uploads it was trained on.
        statistics_frames: frames behind its statistics.
        metrics: for people.
    """

    states: Mapping[str, NormState]
    activations: tuple[ActivationScale, ...]
    domain: str
    samples: int
    statistics_frames: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Distiller:
    """One per (bundle, cohort). Not thread-safe.

    Args:
        bundle: open.
        teachers: see `load_teachers`.
        settings: numbers.
        student: the bundle's, where one is open already; every training loads it anew.
    """

    def __init__(
        self,
        bundle: Bundle,
        teachers: Teachers,
        settings: DistilSettings | None = None,
        *,
        student: Student | None = None,
    ) -> None:
        self.settings = settings or DistilSettings()
        torch.set_num_threads(self.settings.threads)
        self._bundle = bundle
        self._teachers = teachers
        self._student = student or Student(bundle)
        self._calibration = Calibration.of(bundle)
        self._corrected = CorrectedTeachers(teachers, self._calibration, self.settings)
        self._domains: dict[str, DomainEvidence] = {}
        self._trained: dict[str, int] = {}
        self._loops: dict[str, CemaLoop] = {}

    def _evidence(self, domain: str) -> DomainEvidence:
        if domain not in self._domains:
            self._domains[domain] = DomainEvidence(self._student.measured, self.settings.kept_samples)
        return self._domains[domain]

    def add_samples(self, images: U8, domain: str, unbiased: NDArray[np.bool_]) -> None:
        """Takes uploads, uint8 (N, H, W, 3), in order of arrival; `unbiased` (N,) tells which were chosen at random."""
        self._evidence(domain).add(images, unbiased)
        if self.settings.recipe in CEMA_LOOPS:
            self._loop(domain).add(torch.from_numpy(self._bundle.preprocess.apply(images)))

    def add_statistics(self, report: pb.StatisticsReport) -> None:
        """Takes a device's statistics report; the same report twice counts once."""
        self._evidence(report.domain).report(report)

    def ready(self) -> list[str]:
        """Domains with enough new samples since their last training, most new first."""
        found = []
        for domain, (arrived, wanted) in self.progress().items():
            if arrived >= wanted and len(self._domains[domain]):
                found.append((self._trained.get(domain, 0) - arrived, domain))
        return [domain for _, domain in sorted(found)]

    def progress(self) -> dict[str, tuple[int, int]]:
        """Domain to (samples it has had, samples its next training wants)."""
        return {
            domain: (
                evidence.arrived,
                max(self.settings.fresh_samples, int(self._trained.get(domain, 0) * self.settings.growth)),
            )
            for domain, evidence in self._domains.items()
        }

    def train(self, domain: str, start: Mapping[str, NormState] | None = None) -> Candidate:
        """Trains on everything known of a domain.

        Args:
            domain: as the devices call it.
            start: what its devices serve, to go on from: a domain learns over all its trainings. As exported when left out.
                CEMA's recipes go on from their own last step instead.

        Raises:
            UsageError: nothing was ever uploaded for it.
        """
        evidence = self._domains.get(domain)
        if evidence is None or not len(evidence):
            raise UsageError(f"There are no samples of domain {domain!r} to train on.", code="no-samples")
        candidate = (
            self._cema(domain, evidence)
            if self.settings.recipe in CEMA_LOOPS
            else self._measured(domain, evidence, start or {})
        )
        self._bundle.norms.check(candidate.states)
        self._bundle.norms.tensors(candidate.states, candidate.activations)
        self._trained[domain] = evidence.arrived
        return candidate

    def _measured(self, domain: str, evidence: DomainEvidence, start: Mapping[str, NormState]) -> Candidate:
        """Every recipe whose statistics are measured: refold's own, and all strategies of the shared loop."""
        s = self.settings
        population = evidence.population(s.population)
        enough = len(population) >= s.population_least
        if not enough and not evidence.reported():
            population = evidence.images[-s.population :]  # nothing unbiased at all: better than the source's statistics
            enough = True
        # A teacher on its own statistics is confidently wrong: even selected samples adapt it better than none.
        self._teachers.adapt(domain, population if enough else evidence.images[-s.population :])
        targets = self._corrected.probabilities(evidence.images, domain)
        self._student.load(start)
        sample = self._student.population(torch.from_numpy(self._bundle.preprocess.apply(population))) if enough else None

        def measured(strength: float) -> list[Moments]:
            if sample is not None:
                return self._student.clamp(sample.measure(strength))
            return self._student.clamp(self._student.served(evidence.reported(), evidence.statistics_frames, strength))

        share = self._best_mix(evidence, targets, measured)

        def measure() -> list[Moments]:
            return measured(share)

        seed = s.seed * 1_000_003 + evidence.arrived
        task = Task(evidence.images, targets, population, self._calibration, measure, seed)
        move = learn if s.recipe == "refold" else run_strategy
        metrics = move(self._student, self._bundle.preprocess, task, s)
        moments = measure()
        return Candidate(
            states=self._student.states(moments),
            activations=(),
            domain=domain,
            samples=len(evidence),
            statistics_frames=len(population) if enough else evidence.statistics_frames,
            metrics={**metrics, "mix": share, "teacher_confidence": float(targets.max(1).mean())},
        )

    def _best_mix(
        self, evidence: DomainEvidence, targets: NDArray[np.float32], measured: Callable[[float], list[Moments]]
    ) -> float:
        """The share of the domain's statistics under which the student, not yet taught, agrees best with the teachers."""
        x, wanted = (
            torch.from_numpy(self._bundle.preprocess.apply(evidence.images[-COMPARED:])),
            lessons(targets[-COMPARED:], self.settings),
        )
        shares: tuple[float, ...] = (self.settings.mix, *self.settings.mixes)
        losses = [cross_entropies(self._student, x, wanted, measured(share), self.settings.batch) for share in shares]
        return shares[convincing(losses)]

    def _loop(self, domain: str) -> CemaLoop:
        if domain not in self._loops:
            self._loops[domain] = CemaLoop(self._student, self._teachers, self.settings, self._classes())
        return self._loops[domain]

    def _classes(self) -> int:
        return int(self._bundle.manifest.class_count)

    def _cema(self, domain: str, evidence: DomainEvidence) -> Candidate:
        loop = self._loop(domain)
        metrics = loop.run()
        return Candidate(
            states=loop.states(),
            activations=(),
            domain=domain,
            samples=len(evidence),
            statistics_frames=evidence.statistics_frames,
            metrics=metrics,
        )
