"""EATA's sample selection (ICML 2022, arXiv 2204.02610): reliable and non-redundant (specs/cema.md §2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.select.verdict import Probabilities, Verdict, entropy_of, informativeness
from refold.errors import UsageError

__all__ = ["Eata", "EataSelector", "redundancy_for"]


@dataclass(frozen=True)
class Eata:
    """Settings of `eata`.

    Attributes:
        high: E_0 as a fraction of ln C.
        redundancy: largest cosine between a kept prediction and the moving mean of kept ones; None: by the number of classes.
        momentum: of that moving mean.
    """

    high: float = 0.4
    redundancy: float | None = None
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.high <= 0 or not 0 <= self.momentum < 1 or (self.redundancy is not None and not 0 < self.redundancy <= 1):
            raise UsageError("EATA's test needs high > 0, a momentum from 0 to below 1 and a redundancy above 0 and up to 1.")


def redundancy_for(class_count: int) -> float:
    """The cosine bound for a number of classes: two softmaxes over few classes are alike by chance.

    The published values are 0.4 at 10, 0.1 at 100 and 0.05 at 1,000 classes; between them the logarithms are interpolated.
    """
    classes, bounds = np.log([2, 10, 100, 1000]), np.log([1.0, 0.4, 0.1, 0.05])
    return float(np.exp(np.interp(math.log(class_count), classes, bounds)))


class EataSelector:
    """Keeps H < E_0 and cos(p, m) < eps; m is a moving mean of the kept predictions, moved by each kept frame."""

    def __init__(self, settings: Eata, class_count: int) -> None:
        self.settings = settings
        self.redundancy = redundancy_for(class_count) if settings.redundancy is None else settings.redundancy
        self._log_classes = math.log(class_count)
        self._high = settings.high * self._log_classes
        self._mean: NDArray[np.float64] | None = None
        self._mean_norm = 0.0

    def judge(self, probs: Probabilities, entropy: float | None = None) -> Verdict:
        entropy = entropy_of(probs) if entropy is None else entropy
        if not math.isfinite(entropy):
            return Verdict(False, 0.0, entropy, "not-finite")
        if entropy >= self._high:
            return Verdict(False, 0.0, entropy, "unreliable")
        if self._mean is None:
            self._mean = probs.astype(np.float64)
        else:
            cosine = float(np.dot(self._mean, probs)) / (self._mean_norm * math.sqrt(float(np.dot(probs, probs))))
            if abs(cosine) >= self.redundancy:
                return Verdict(False, 0.0, entropy, "redundant")
            self._mean = self.settings.momentum * self._mean + (1.0 - self.settings.momentum) * probs
        self._mean_norm = math.sqrt(float(np.dot(self._mean, self._mean)))
        return Verdict(True, informativeness(entropy, self._log_classes), entropy, "kept")
