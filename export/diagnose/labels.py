"""Labels that cannot be the model's class numbers: counted from other folders, or numbered in another order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from export.diagnose.finding import Finding
from export.diagnose.intervals import interval
from export.pictures import Pictures
from refold.errors import InputError

__all__ = ["checked", "numbering"]

I64 = NDArray[np.int64]
PER_CLASS = 10  # images for each class from which a matching of classes is more than a coincidence
RIGHT = 0.5  # lower bound of the accuracy under another numbering
TIMES = 3.0  # that accuracy over the one as given


def checked(pictures: Pictures, classes: int, what: str) -> tuple[Pictures, tuple[Finding, ...]]:
    """The images with labels that may be class numbers of the model, or without any.

    Args:
        classes: of the model.
        what: "calibration" or "validation".

    Raises:
        InputError: a label is no class of the model.
    """
    found = tuple(Finding("labels", note) for note in pictures.notes)
    if pictures.labels is None:
        return pictures, found
    if pictures.folders and len(pictures.folders) != classes:
        note = (
            f"The {what} images lie in {len(pictures.folders)} class folders and the model has {classes} classes: which folder "
            "is which class is not known, so they count as unlabelled. Name all classes in the model's order with --classes."
        )
        bare = Pictures(pictures.images, None, pictures.skipped, pictures.folders, pictures.notes)
        return bare, (*found, Finding("labels", note, {"folders": float(len(pictures.folders)), "classes": float(classes)}))
    low, high = int(pictures.labels.min()), int(pictures.labels.max())
    if low < 0 or high >= classes:
        raise InputError(
            f"A label of the {what} images is {high if high >= classes else low}; the model's classes are 0 to {classes - 1}. "
            "Number them as the model does, or leave the labels out.",
            code="labels",
        )
    return pictures, found


def numbering(predicted: I64, labels: I64, classes: int) -> Iterator[Finding]:
    """Says so where another numbering of the labels explains the answers that the given one does not.

    Args:
        predicted, labels: int64 (N,).
    """
    count, hits = len(labels), int((predicted == labels).sum())
    for shift in (1, -1):
        moved = int((predicted == labels + shift).sum())
        if moved > TIMES * hits and interval(moved, count)[0] > max(RIGHT / 2, 2 / classes):
            yield Finding(
                "labels",
                f"The model's answers fit the labels {'plus' if shift > 0 else 'minus'} one: {moved / count:.1%} instead of "
                f"{hits / count:.1%} are then right. Number the classes as the model does.",
                {"accuracy": hits / count, "accuracy_renumbered": moved / count, "shift": float(shift)},
            )
            return
    if count < PER_CLASS * classes:
        return
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (labels, predicted), 1)
    matched = _matching(table)
    right = int(table[np.arange(classes), matched].sum())
    if right > TIMES * hits and interval(right, count)[0] > RIGHT:
        first = next(c for c in range(classes) if matched[c] != c)
        yield Finding(
            "labels",
            "The labels seem to be numbered in another order than the model's classes: matched one to one, "
            f"{right / count:.1%} instead of {hits / count:.1%} are right (the model answers {matched[first]} where the label "
            f"is {first}). Name the classes in the model's order with --classes.",
            {"accuracy": hits / count, "accuracy_renumbered": right / count},
        )


def _matching(table: NDArray[np.int64]) -> list[int]:
    """Each label's answer, one to one, the most frequent pairs first."""
    left, matched = table.astype(np.float64), [0] * len(table)
    for _ in range(len(table)):
        label, answer = np.unravel_index(int(left.argmax()), left.shape)
        matched[int(label)] = int(answer)
        left[label, :] = left[:, answer] = -1
    return matched
