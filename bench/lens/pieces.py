"""One student, trained on one case of one corruption and judged on other images of it: a piece."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray

from bench.adaptation.student_bundle import student_bundle
from bench.corrupt.streams import stream
from bench.kept import Keeper, run_kept
from bench.lens.candidates import CANDIDATES, NORMS, AddedStudent
from bench.lens.cases import CASES, Case, Scale
from bench.strategies.teachers import cached_teachers
from cloud.distil import Distiller, DistilSettings, Student, Teachers
from cloud.distil.norm_mode import Moments
from refold.norms import NormState

__all__ = ["Piece", "TableTeachers", "Work", "run_pieces"]

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
KEEPER = Keeper(
    "lens",
    (
        "bench/lens/candidates.py",
        "bench/lens/pieces.py",
        "bench/corrupt",
        "bench/adaptation/student_bundle.py",
        "bench/strategies/teachers.py",
        "cloud/distil",
        "cloud/training",
        "refold",
    ),
)
BATCH = 50
CLASSES = 10


@dataclass(frozen=True)
class Work:
    """A candidate ("norms alone": none) at a learning rate (0: there is nothing to learn at it) on a corruption's images in the
    order that `seed` gives; case: its name."""

    candidate: str
    rate: float
    corruption: str
    seed: int
    case: str


@dataclass(frozen=True)
class Piece:
    """What came of it.

    Attributes:
        accuracy: of the fake-quantised student on images that were not uploaded, in %.
        share: how far along the learnt step the release went, 0 to 1.
        restyled: share of restyled images in a step.
        seconds: of processor time, for the training.
    """

    work: Work
    accuracy: float
    share: float
    restyled: float
    seconds: float


class TableTeachers(Teachers):
    """Answers that are known already: true labels, or what teachers said who were adapted once for all cases."""

    def __init__(self, like: Teachers, images: U8, probabilities: F32) -> None:
        super().__init__(like.teachers, like.preprocess, like.settings)
        self._known = {image.tobytes(): p for image, p in zip(images, probabilities, strict=True)}

    def adapt(self, domain: str, images: U8) -> None:
        """They are adapted."""

    def probabilities(self, images: U8, domain: str = "") -> F32:
        return np.stack([self._known[image.tobytes()] for image in images]).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Subject:
    """One corruption: what was uploaded with its labels and the teachers' predictions, and what is judged."""

    uploads: U8
    labels: NDArray[np.int64]
    predicted: F32
    judged: U8
    truth: NDArray[np.int64]


def run_pieces(work: list[Work], scale: Scale, title: str, *, processes: int, resume: bool) -> list[Piece]:
    """Every piece, in any order; one line each on the terminal."""
    kept = partial(_kept, scale=scale) if resume else None
    return run_kept(work, kept, partial(_run, scale=scale), _line, title, processes=processes)


def _line(piece: Piece) -> str:
    w = piece.work
    return f"{w.corruption:18s} {w.case:30s} {w.candidate:12s} {w.rate:<7g} {piece.accuracy:5.1f} %  {piece.seconds:5.1f} s"


def _run(work: Work, scale: Scale) -> Piece:
    torch.set_num_threads(1)
    case = next(c for c in CASES if c.name == work.case)
    settings = _settings(case, scale)
    subject = _subject(work.corruption, work.seed, scale)
    student = _student(work.candidate, work.rate / settings.rate)
    uploads, predicted = subject.uploads[-case.uploads :], subject.predicted[-case.uploads :]
    if case.labels:
        predicted = np.eye(CLASSES, dtype=np.float32)[subject.labels[-case.uploads :]]
    teachers = TableTeachers(cached_teachers(), uploads, predicted)
    started = time.process_time()
    distiller = Distiller(student_bundle(), teachers, settings, student=student)
    distiller.add_samples(uploads, work.corruption, np.ones(len(uploads), bool))
    candidate = distiller.train(work.corruption)
    seconds = time.process_time() - started
    accuracy = _accuracy(student, dict(candidate.states), subject)
    metrics = candidate.metrics
    piece = Piece(work, accuracy, float(metrics["share"]), float(metrics["restyled"]), round(seconds, 2))
    KEEPER.store(_asked(work, scale), asdict(piece))
    return piece


def _settings(case: Case, scale: Scale) -> DistilSettings:
    return DistilSettings.of({**scale.distil, **({} if case.restyled else {"restyled": 0.0})})


def _accuracy(student: Student, states: dict[str, NormState], subject: Subject) -> float:
    """Of the student as the training left it, behind the candidate's statistics."""
    moments = [Moments(*(torch.tensor(v) for v in (states[s.name].mean, states[s.name].variance))) for s in student.measured]
    bundle = student_bundle()
    right = 0
    with torch.no_grad():
        for i in range(0, len(subject.judged), BATCH):
            x = torch.from_numpy(bundle.preprocess.apply(subject.judged[i : i + BATCH]))
            right += int((student.logits(x, moments).argmax(1).numpy() == subject.truth[i : i + BATCH]).sum())
    return round(100 * right / len(subject.judged), 3)


@cache
def _student(candidate: str, factor: float) -> Student:
    """One for all pieces: opening it takes a second, and each training loads it anew."""
    if candidate == NORMS:
        return Student(student_bundle())
    return AddedStudent(student_bundle(), next(c for c in CANDIDATES if c.name == candidate), factor)


@cache
def _subject(corruption: str, seed: int, scale: Scale) -> Subject:
    frames = stream(corruption, scale.uploads + scale.judged, seed=seed)
    uploads, labels = frames.images[: scale.uploads], frames.labels[: scale.uploads]
    teachers = cached_teachers()
    domain = f"{corruption} {seed}"
    teachers.adapt(domain, uploads[-_settings(CASES[0], scale).population :])
    predicted = teachers.probabilities(uploads, domain)
    return Subject(uploads, labels, predicted, frames.images[scale.uploads :], frames.labels[scale.uploads :])


def _asked(work: Work, scale: Scale) -> list[object]:
    case = next(c for c in CASES if c.name == work.case)
    sizes = replace(scale, report=(), development=(), cases=(), rates=(), seeds=0)  # these say only which pieces there are
    return [asdict(work), asdict(case), asdict(sizes)]


def _kept(work: Work, scale: Scale) -> Piece | None:
    return KEEPER.piece(_asked(work, scale), Piece, Work)
