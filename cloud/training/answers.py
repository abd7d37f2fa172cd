"""What teachers answer, checked: probabilities over the bundle's classes, whatever network a user gave."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from refold.bundle import Bundle
from refold.errors import ModelError, RefoldError

__all__ = ["Voices", "asked", "check_answers", "grey_image"]

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
SUM_TOLERANCE = 1e-3  # of a row of probabilities, float32


class Voices(Protocol):
    """`cloud.lesson.Teachers`."""

    def probabilities(self, images: U8, domain: str) -> F32: ...


def asked(teachers: Voices, images: U8, domain: str, classes: int, name: str) -> F32:
    """The teachers' probabilities, float32 (N, classes), for uint8 (N, height, width, 3).

    Raises:
        ModelError: they cannot be run on such images, or their answers are no probabilities over the bundle's classes.
    """
    try:
        probabilities = teachers.probabilities(images, domain)
    except RefoldError:
        raise
    except Exception as e:  # a user's network: whatever it raises becomes a sentence
        size = "x".join(map(str, images.shape[1:3]))
        raise ModelError(
            f"The teacher {name} cannot be run on {size} images: {type(e).__name__}: {_first_line(e)}", code="teacher"
        ) from e
    check_answers(probabilities, len(images), classes, name)
    return probabilities


def check_answers(probabilities: F32, count: int, classes: int, name: str) -> None:
    """Raises ModelError unless these are `count` rows of probabilities over `classes` classes."""
    if probabilities.ndim != 2 or len(probabilities) != count:
        raise ModelError(f"The teacher {name} answers {probabilities.shape} for {count} images.", code="teacher")
    if probabilities.shape[1] != classes:
        raise ModelError(
            f"The teacher {name} knows {probabilities.shape[1]:,} classes, the bundle {classes:,}: "
            "its classes must be the bundle's, in the same order.",
            code="teacher-classes",
        )
    whole = np.isfinite(probabilities).all() and (probabilities >= 0).all()
    if not whole or (np.abs(probabilities.sum(1) - 1) > SUM_TOLERANCE).any():
        raise ModelError(f"The teacher {name} answers values that are no probabilities (not finite, for one).", code="teacher")


def grey_image(bundle: Bundle) -> U8:
    """One grey image of the bundle's size, uint8 (1, height, width, 3): enough to see what a teacher answers."""
    return np.full((1, bundle.preprocess.height, bundle.preprocess.width, 3), 128, np.uint8)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200].rstrip(".") + "."
