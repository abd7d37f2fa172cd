"""Two engines on the same held-out images, judged by what a teacher thinks of each.

Nobody knows the labels, and there are a few dozen images. Counting on how many the answer agrees with the teacher's wastes
most of what they tell, so two paired statistics are kept:

* the *expected* rise of accuracy: the teacher's probability of the new answer less that of the old one. Where the teacher is
  torn between two classes, a change from one to the other counts for nothing. Its standard error is that of the images whose
  answer changed: with few of them, or of images, it is wide, and says so.
* the cross-entropy against the teacher's probabilities after each engine's logits were scaled by the temperature that suits it
  best (Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2). Without that a candidate that merely became
  less sure looks better: on gaussian noise one that had lost 6.6 points of accuracy had the lower cross-entropy by 2.2 standard
  errors (docs/adr/005-gate.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Comparison", "Scores", "histogram_entropy", "paired", "tempered"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
LEAST = 1e-6  # probability below which a cross-entropy no longer grows
TEMPERATURES = np.exp(np.linspace(math.log(0.1), math.log(20.0), 25))
STEP = float(TEMPERATURES[1] / TEMPERATURES[0])


@dataclass(frozen=True)
class Scores:
    """One engine on the held-out images, against the teacher.

    Attributes:
        agreement: share of equal argmax, 0..1.
        class_entropy: entropy of the histogram of predicted classes, nats.
        expected: float64 (N,), the teacher's probability of the engine's answer.
        cross_entropy: float64 (N,), nats, at the engine's best temperature.
        confidence: mean of the teacher's largest probabilities: how far one answer can move `expected`.
    """

    agreement: float
    class_entropy: float
    expected: F64
    cross_entropy: F64
    confidence: float = 1.0

    @classmethod
    def of(cls, logits: F32, teacher: F32) -> Scores:
        """logits and teacher probabilities, float32 (N, classes), N at least 1."""
        predicted = logits.argmax(1)
        return cls(
            float((predicted == teacher.argmax(1)).mean()),
            histogram_entropy(predicted, logits.shape[1]),
            teacher[np.arange(len(teacher)), predicted].astype(np.float64),
            tempered(logits, teacher),
            float(teacher.max(1).mean()),
        )


def tempered(logits: F32, teacher: F32) -> F64:
    """Cross-entropy of each image at the one temperature that makes their mean least: float64 (N,), nats."""
    x = logits.astype(np.float64)
    coarse = [float(_cross_entropy(x / t, teacher).mean()) for t in TEMPERATURES]
    about = TEMPERATURES[int(np.argmin(coarse))]
    fine = about * STEP ** np.linspace(-1, 1, 17)
    found = [_cross_entropy(x / t, teacher) for t in fine]
    return min(found, key=lambda ce: float(ce.mean()))


def _cross_entropy(logits: F64, teacher: F32) -> F64:
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    found: F64 = -(teacher * np.maximum(log_p, math.log(LEAST))).sum(1)
    return found


def histogram_entropy(classes: NDArray[np.integer], count: int) -> float:
    """Entropy in nats of the shares of `count` classes."""
    shares = np.bincount(classes, minlength=count) / max(len(classes), 1)
    return float(-(shares * np.log(np.where(shares > 0, shares, 1.0))).sum())


@dataclass(frozen=True)
class Comparison:
    """A paired mean difference, new less old.

    Attributes:
        images: N.
        rise: mean over images; of shares, 0.01 is a point.
        error: its standard error. Never 0: had one more image changed its answer, that is how far the mean had moved.
    """

    images: int
    rise: float
    error: float

    @property
    def standard_errors(self) -> float:
        """The rise in units of its error."""
        return self.rise / self.error

    def smallest_effect(self, standard_errors: float) -> float:
        """The smallest change that so many images could tell from none."""
        return standard_errors * self.error

    def images_for(self, effect: float, standard_errors: float) -> int:
        """How many images like these it takes to tell `effect` from none."""
        return math.ceil(self.images * (self.smallest_effect(standard_errors) / max(abs(effect), 1e-9)) ** 2)


def paired(new: F64, old: F64, unit: float = 1.0) -> Comparison:
    """Compares values of the same images, float64 (N,). `unit`: how far one image can move, for the least error.

    Raises:
        ValueError: no images, or a value that is not finite: there is nothing to compare.
    """
    difference = new - old
    count = len(difference)
    if not count or not np.isfinite(difference).all():
        raise ValueError("no images, or values that are not finite")
    spread = float(difference.std(ddof=1)) if count > 1 else unit
    return Comparison(count, float(difference.mean()), max(spread / math.sqrt(count), unit / count))
