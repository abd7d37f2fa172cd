"""CEMA's upload rule (ICLR 2024, arXiv 2402.17316), as the paper describes it and as its repository ships it.

The two differ: the released configuration switches both dynamic pieces off and EATA's redundancy test on
(specs/cema.md §1.2), so they are two selectors. Both judge frame by frame where the authors judge batches of 64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge.select.eata import Eata, EataSelector
from edge.select.verdict import Probabilities, Verdict, entropy_of, informativeness
from refold.errors import UsageError

__all__ = ["CemaPaper", "CemaPaperSelector", "CemaReleased", "cema_released"]


@dataclass(frozen=True)
class CemaPaper:
    """Settings of `cema-paper`; entropies are fractions of ln C.

    Attributes:
        high: E_max before warm-up and its factor afterwards (0.4 ln C).
        low: E_min; 0.02 is the value in the authors' notes, 0 switches the test off.
        coefficient: lambda; multiplies once, it is not compounded.
        warm_up: frames after which the mean entropy is frozen as the reference Ebar^0 (the authors' value is not published).
    """

    high: float = 0.4
    low: float = 0.02
    coefficient: float = 1.0
    warm_up: int = 200

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high or self.coefficient <= 0 or self.warm_up < 1:
            raise UsageError("cema-paper needs 0 <= low < high, a coefficient above 0 and a warm-up of at least one frame.")


class CemaPaperSelector:
    """Keeps E_min < H < E_max^t with E_max^t = 0.4 ln C * (Ebar^t / Ebar^0) * lambda after warm-up.

    Ebar^t is the mean entropy of *all* frames so far, updated before the frame is tested, as coded by the authors. When the
    model adapts, Ebar falls, the band narrows and fewer frames are uploaded.
    """

    def __init__(self, settings: CemaPaper, class_count: int) -> None:
        self.settings = settings
        self._log_classes = math.log(class_count)
        self._static = settings.high * self._log_classes
        self._low = settings.low * self._log_classes
        self._seen = 0
        self._total = 0.0
        self._reference = 0.0

    @property
    def threshold(self) -> float:
        """E_max^t, in nats."""
        if self._seen < self.settings.warm_up or self._reference <= 0.0:
            return self._static
        return self._static * (self._total / self._seen / self._reference) * self.settings.coefficient

    def judge(self, probs: Probabilities, entropy: float | None = None) -> Verdict:
        entropy = entropy_of(probs) if entropy is None else entropy
        if not math.isfinite(entropy):
            return Verdict(False, 0.0, entropy, "not-finite")
        self._seen += 1
        self._total += entropy
        if self._seen == self.settings.warm_up:
            self._reference = self._total / self._seen
        if entropy >= self.threshold:
            return Verdict(False, 0.0, entropy, "unreliable")
        if entropy <= self._low:
            return Verdict(False, 0.0, entropy, "uninformative")
        return Verdict(True, informativeness(entropy, self._log_classes), entropy, "kept")


@dataclass(frozen=True)
class CemaReleased:
    """Settings of `cema-released`: conf/cema.conf as published, whatever the number of classes."""

    high: float = 0.4
    redundancy: float = 0.05
    momentum: float = 0.9


def cema_released(settings: CemaReleased, class_count: int) -> EataSelector:
    """Static E_max and the cosine test; E_min and the moving threshold are off, as in the released configuration."""
    return EataSelector(Eata(settings.high, settings.redundancy, settings.momentum), class_count)
