"""One row, trained and judged on one corruption: a piece. Finished pieces are kept, so that a run can go on."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray

from bench.adaptation.student_bundle import student_bundle
from bench.corrupt.streams import stream
from bench.kept import Keeper, run_kept
from bench.strategies.rows import ROWS, STATISTICS, Row, Scale
from bench.strategies.teachers import cached_teachers
from cloud.distil import Distiller, DistilSettings, Student, Teachers
from edge.engine import EngineFactory
from edge.serving import ServingState
from refold.norms import NormState

__all__ = ["Piece", "Work", "run_pieces"]

U8 = NDArray[np.uint8]
KEEPER = Keeper(
    "strategies",
    (
        "bench/strategies",
        "bench/corrupt",
        "bench/adaptation/student_bundle.py",
        "cloud/distil",
        "cloud/training",
        "refold",
    ),
)
BATCH = 50


@dataclass(frozen=True)
class Work:
    """A row at one learning rate (0: its own) on one corruption, in the order that `seed` gives."""

    row: str
    rate: float
    corruption: str
    seed: int


@dataclass(frozen=True)
class Piece:
    """What came of it.

    Attributes:
        accuracy: of the int8 engine on images that were not uploaded, in %.
        exported: of the exported state on the same images, in %.
        share: how far along the learnt step the release went, 0 to 1; NaN where a recipe has no such choice.
        seconds: of the training, teachers' predictions left out where they were known.
    """

    work: Work
    accuracy: float
    exported: float
    share: float
    seconds: float


@dataclass(frozen=True)
class Subject:
    """One corruption: what was uploaded, and what is judged."""

    uploads: U8
    images: U8
    labels: NDArray[np.int64]


def run_pieces(work: list[Work], scale: Scale, title: str, *, processes: int, resume: bool) -> list[Piece]:
    """Every piece, in any order; one line each on the terminal."""
    kept = partial(_kept, scale=scale) if resume else None
    return run_kept(work, kept, partial(_run, scale=scale), _line, title, processes=processes)


def _line(piece: Piece) -> str:
    w = piece.work
    return f"{w.corruption:18s} {w.row:30s} {w.rate:<7g} {piece.accuracy:5.1f} %  {piece.seconds:6.1f} s"


def _run(work: Work, scale: Scale) -> Piece:
    torch.set_num_threads(1)
    subject = _subject(work.corruption, work.seed, scale)
    row = next(r for r in ROWS if r.name == work.row)
    teachers = cached_teachers()
    domain = f"{work.corruption} {work.seed}"
    settings = row.settings(work.rate, scale) if row.recipe != STATISTICS else DistilSettings.of(scale.distil)
    _ask(teachers, subject, domain, settings)
    started = time.perf_counter()
    states, share = _trained(row, settings, teachers, subject, domain)
    seconds = time.perf_counter() - started
    piece = Piece(
        work, _accuracy(states, subject), _exported_accuracy(work.corruption, work.seed, scale), share, round(seconds, 2)
    )
    _keep(work, scale, piece)
    return piece


def _ask(teachers: Teachers, subject: Subject, domain: str, settings: DistilSettings) -> None:
    """Has the teachers answer before the clock starts: every row pays for them once, and it is the same for all."""
    teachers.adapt(domain, subject.uploads[-settings.population :])
    teachers.probabilities(subject.uploads, domain)


def _trained(
    row: Row, settings: DistilSettings, teachers: Teachers, subject: Subject, domain: str
) -> tuple[dict[str, NormState], float]:
    bundle = student_bundle()
    if row.recipe == STATISTICS:
        student = _student()
        student.load({})
        population = subject.uploads[-settings.population :]
        sample = student.population(torch.from_numpy(bundle.preprocess.apply(population)))
        moments = student.clamp(sample.measure(settings.mix))
        return student.states(moments), 0.0
    distiller = Distiller(bundle, teachers, settings, student=_student())
    distiller.add_samples(subject.uploads, domain, np.ones(len(subject.uploads), bool))
    candidate = distiller.train(domain)
    return dict(candidate.states), float(candidate.metrics.get("share", float("nan")))


def _accuracy(states: dict[str, NormState], subject: Subject) -> float:
    bundle = student_bundle()
    engine = _factory().build(ServingState(states=states))
    parts = [engine.run(bundle.preprocess.apply(subject.images[i : i + BATCH])) for i in range(0, len(subject.images), BATCH)]
    return round(100 * float((np.concatenate(parts).argmax(1) == subject.labels).mean()), 2)


@cache
def _exported_accuracy(corruption: str, seed: int, scale: Scale) -> float:
    return _accuracy({}, _subject(corruption, seed, scale))


@cache
def _student() -> Student:
    """One for all pieces: opening it takes as long as a short training, and each training loads it anew."""
    return Student(student_bundle())


@cache
def _factory() -> EngineFactory:
    return EngineFactory(student_bundle())


@cache
def _subject(corruption: str, seed: int, scale: Scale) -> Subject:
    frames = stream(corruption, scale.uploads + scale.judged, seed=seed)
    return Subject(frames.images[: scale.uploads], frames.images[scale.uploads :], frames.labels[scale.uploads :])


def _asked(work: Work, scale: Scale) -> list[dict[str, object]]:
    row = next(r for r in ROWS if r.name == work.row)
    return [asdict(work), asdict(row), asdict(scale)]


def _kept(work: Work, scale: Scale) -> Piece | None:
    return KEEPER.piece(_asked(work, scale), Piece, Work)


def _keep(work: Work, scale: Scale, piece: Piece) -> None:
    KEEPER.store(_asked(work, scale), asdict(piece))
