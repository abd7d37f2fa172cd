"""What a selector says about one frame, and the two numbers every selector needs: entropy and informativeness."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Probabilities", "Selector", "Verdict", "entropy_of", "informativeness"]

Probabilities = NDArray[np.float32]
TINY = 1e-30  # keeps log(0) finite in float32; 0 * log(TINY) is 0


class Verdict(NamedTuple):
    """One frame's judgement (a tuple, because one is made for every frame).

    Attributes:
        keep: upload it.
        score: order among kept samples; higher goes first and is evicted last.
        entropy: of the served prediction, in nats.
        reason: "kept", "random", "new-domain", "novel", or why not: "unreliable", "uninformative", "redundant",
            "below-threshold", "rate", "spacing", "not-finite".
        unbiased: chosen at random, independent of the model: goes into `SampleHeader.unbiased`.
    """

    keep: bool
    score: float
    entropy: float
    reason: str
    unbiased: bool = False


class Selector(Protocol):
    """A state machine over frames: no clock, no I/O; not thread-safe."""

    def judge(self, probs: Probabilities, entropy: float | None = None) -> Verdict:
        """Judges the next frame.

        Args:
            probs: float32 (class_count,), softmax of the engine's dequantised logits.
            entropy: of `probs` in nats where it is known already; None computes it.
        """
        ...


def entropy_of(probs: Probabilities) -> float:
    """-sum p ln p, in nats; 0 for certainty, ln C for a uniform prediction, NaN when a probability is not finite."""
    entropy = -float(np.dot(probs, np.log(probs + TINY)))
    return 0.0 if -1e-4 < entropy < 0.0 else entropy


def informativeness(entropy: float, log_classes: float, peak: float = 0.5) -> float:
    """How much a teacher's answer is likely to teach: 0 at certainty and at chance, 1 at `peak` of the largest entropy.

    The curve is a Beta density scaled to 1 at its mode; with peak 0.5 it is 4u(1 - u), u = H / ln C.
    """
    u = min(max(entropy / log_classes, 0.0), 1.0)
    if u in (0.0, 1.0):
        return 0.0
    return math.exp(2.0 * (peak * math.log(u / peak) + (1.0 - peak) * math.log((1.0 - u) / (1.0 - peak))))
