"""A teacher is run once before it is registered: on the bundle's calibration images, beside the exported model.

    try_teachers(bundle, pairs, maker, settings) -> Trial       refused with a sentence, or figures and warnings

What can only be wrong is refused: a teacher that does not load, run, or answer probabilities over the bundle's classes, and
one that answers the same class whatever it is shown. What may be meant is warned of: a teacher worse than the model it is to
teach.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloud.lesson import MakeLesson
from cloud.training.answers import asked, grey_image
from refold.bundle import Bundle
from refold.errors import ModelError, UsageError

__all__ = ["Figures", "Trial", "figures", "try_teachers"]

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
MOST = 256  # calibration images a teacher is tried on: 256 tell an accuracy to 3 points, and cost seconds
MEMORISED = 0.99  # accuracy above which calibration images may well be training images
WORSE = 2.0  # standard errors of a paired difference beyond which a teacher is called worse than the student
CHANCE = 2.0  # times chance: agreement with the student below this says that classes or preprocessing are not the same


@dataclass(frozen=True)
class Figures:
    """One teacher on the calibration images.

    Attributes:
        teacher: its spec; "all" for the mean of several.
        images: how many there were.
        accuracy: share of right answers where the images have labels, 0..1; None without labels.
        agreement: share of the exported model's answers that are the teacher's too, 0..1.
        confidence: mean largest probability, 0..1.
        ms_per_image: of all its views, on this machine, milliseconds.
        warnings: sentences.
    """

    teacher: str
    images: int
    accuracy: float | None
    agreement: float
    confidence: float
    ms_per_image: float
    warnings: tuple[str, ...] = ()

    def sentence(self) -> str:
        parts = [f"agrees with the exported model on {100 * self.agreement:.1f} % of {self.images} calibration images"]
        if self.accuracy is not None:
            parts.insert(0, f"right on {100 * self.accuracy:.1f} %")
        parts += [f"mean confidence {100 * self.confidence:.0f} %", f"{self.ms_per_image:.1f} ms per image"]
        return f"{self.teacher}: {', '.join(parts)}."


@dataclass(frozen=True)
class Trial:
    """What a registration prints: the student's own accuracy (None without labels), and every teacher's figures."""

    student_accuracy: float | None
    teachers: tuple[Figures, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(w for t in self.teachers for w in t.warnings)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "student_accuracy": self.student_accuracy,
            "trial": [{k: v for k, v in asdict(t).items() if k != "warnings"} for t in self.teachers],
            "warnings": list(self.warnings),
        }


def try_teachers(
    bundle: Bundle,
    pairs: Sequence[tuple[str, str]],
    maker: MakeLesson,
    settings: Mapping[str, Any],
    images: U8,
    labels: I64 | None,
    student: F32,
) -> Trial:
    """Loads every teacher as a worker would and has it answer the calibration images. Loads torch; writes nothing.

    Args:
        pairs: (spec, weights) of each teacher.
        maker: makes the distiller and its teachers: `cloud.lesson.find_maker`.
        settings: `[distil]`.
        images: uint8 (N, height, width, 3), the calibration images; may be empty, then teachers answer one grey image.
        labels: int64 (N,), None where unknown.
        student: logits float32 (N, classes) of the exported engine for them.

    Raises:
        UsageError: a teacher cannot be found.
        InputError: its weights do not fit.
        ModelError: it cannot be run, or its answers are no probabilities over the bundle's classes.
    """
    images, student = images[:MOST], student[:MOST]
    labels = labels[:MOST] if labels is not None else None
    found, answers = [], []
    for pair in pairs:
        probabilities, seconds = _answers(bundle, pair, maker, settings, images)
        answers.append(probabilities)
        found.append(figures(pair[0], probabilities, student, labels, 1e3 * seconds / max(len(images), 1)))
    if len(pairs) > 1:
        mean: F32 = np.stack(answers).mean(0).astype(np.float32)
        found.append(figures("all together", mean, student, labels, sum(f.ms_per_image for f in found)))
    own = float((student.argmax(1) == labels).mean()) if labels is not None and len(labels) else None
    return Trial(own, tuple(found))


def _answers(
    bundle: Bundle, pair: tuple[str, str], maker: MakeLesson, settings: Mapping[str, Any], images: U8
) -> tuple[F32, float]:
    """Probabilities for every image, and how many seconds they took."""
    lesson = maker(bundle, [pair], settings, threads=1)
    if lesson.teachers is None:
        raise UsageError(f"The distiller takes no teacher {pair[0]!r}: leave --teacher out.", code="no-teacher")
    shown = images if len(images) else grey_image(bundle)
    began = time.perf_counter()
    probabilities = asked(lesson.teachers, shown, "d0", int(bundle.manifest.class_count), pair[0])[: len(images)]
    return probabilities, time.perf_counter() - began


def figures(name: str, teacher: F32, student: F32, labels: I64 | None, ms_per_image: float) -> Figures:
    """Pure: how a teacher does beside the exported model.

    Args:
        teacher: probabilities float32 (N, classes); student: logits of the same shape; labels: int64 (N,) or None.

    Raises:
        ModelError: the teacher answers one class for all images, where the student knows several.
    """
    count = len(teacher)
    if not count:
        return Figures(name, 0, None, 0.0, 0.0, ms_per_image, ("The bundle has no calibration images: nothing was compared.",))
    answer, own = teacher.argmax(1), student.argmax(1)
    if len(np.unique(answer)) == 1 and len(np.unique(own)) > 1:
        raise ModelError(
            f"The teacher {name} answers class {int(answer[0])} for all {count} calibration images: "
            "its weights or its preprocessing are not what it was trained with.",
            code="teacher-constant",
        )
    agreement = float((answer == own).mean())
    warnings = []
    accuracy = None
    if labels is not None:
        right, students = answer == labels, own == labels
        accuracy = float(right.mean())
        lost, gained = int((students & ~right).sum()), int((right & ~students).sum())
        if lost - gained > WORSE * np.sqrt(lost + gained):
            warnings.append(
                f"{name} is right on {100 * accuracy:.1f} % of the calibration images, the exported model on "
                f"{100 * float(students.mean()):.1f} %: a teacher worse than its student cannot help it"
                f"{' (but images it was trained on flatter it)' if students.mean() > MEMORISED else ''}."
            )
    if agreement < CHANCE / teacher.shape[1]:
        warnings.append(
            f"{name} agrees with the exported model hardly more often than chance: "
            "are its classes in the bundle's order, and its inputs preprocessed alike?"
        )
    return Figures(name, count, accuracy, agreement, float(teacher.max(1).mean()), ms_per_image, tuple(warnings))
