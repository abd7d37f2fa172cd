"""The best frames a byte budget can carry, and among them some that the model did not choose.

Two shares of one rate (uploads per frame):

* *chosen*: the highest scores. A score is high for middling entropy (a teacher's answer is news there) and for classes rarely
  kept of late. The threshold is a quantile of the latest scores, so that the wanted share passes it whatever the domain.
* *random*: each frame with the same probability, whatever the model thinks of it. Confident samples alone are a biased
  population; statistics and held-back tests need these (issue 2 item 6).

A credit that grows by the rate with every frame holds the sum of both to the rate, bursts aside.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

from edge.select.verdict import Probabilities, Verdict, entropy_of, informativeness
from refold.errors import UsageError

__all__ = ["Budget", "BudgetSelector", "rate_within", "room"]

UNBIASED_SCORE = 1.0  # the same for every random frame: eviction must not look at what the model thinks of them
WINDOW = (128, 4096)  # latest scores looked at: at least four above the threshold, and a new domain fills it soon
REFRESHES = 16  # thresholds per window: one partition of it every few frames costs nothing per frame


@dataclass(frozen=True)
class Budget:
    """Settings of `budget`.

    Attributes:
        rate: uploads per frame, 0 to 1. `rate_within` derives it from a byte budget.
        unbiased: part of the rate that is chosen at random, 0 to 1.
        peak: entropy of the most informative frame, as a fraction of ln C.
        balance: 0 ignores classes, 1 weighs them by the inverse of how often they were kept.
        burst: frames' worth of uploads that may be kept at once after a quiet time.
        spacing: frames to wait after a chosen one: neighbours in a video are near-duplicates.
        seed: of the random share.
    """

    rate: float = 0.05
    unbiased: float = 0.25
    peak: float = 0.5
    balance: float = 0.5
    burst: int = 16
    spacing: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        shares = (self.rate, self.unbiased, self.balance)
        if not all(0 <= s <= 1 for s in shares) or not 0 < self.peak < 1 or self.burst < 1 or self.spacing < 0:
            raise UsageError(
                "The budget selector needs rate, unbiased and balance from 0 to 1, peak between 0 and 1, burst of at least 1 "
                "and spacing of at least 0."
            )


def rate_within(bytes_per_hour: int | None, sample_bytes: float, frames_per_second: float) -> float:
    """Uploads per frame that just fill a byte budget; 1 when there is no budget (None) or the frames are slow enough."""
    if bytes_per_hour is None:
        return 1.0
    frames = max(frames_per_second * 3600.0, 1e-9)
    return min(1.0, bytes_per_hour / max(sample_bytes, 1.0) / frames)


def room(available: int | None, waiting: int, sample_bytes: float) -> float:
    """How many more samples an hour carries: `available` bytes (None: any number), of which `waiting` are spoken for."""
    return math.inf if available is None else max(available - waiting, 0) / max(sample_bytes, 1.0)


class BudgetSelector:
    """Streaming top-k by an adaptive threshold, plus an unbiased share (see the module)."""

    def __init__(self, settings: Budget, class_count: int) -> None:
        self.settings = settings
        self.rate = settings.rate
        self._log_classes = math.log(class_count)
        self._random = random.Random(settings.seed)
        self._credit = 1.0
        self._wait = 0
        self._threshold = 0.0
        self._seen = 0
        size = min(max(math.ceil(4.0 / max(settings.rate, 1e-6)), WINDOW[0]), WINDOW[1])
        self._scores = np.zeros(size, np.float32)
        self._decay = 1.0 - 1.0 / (10.0 * class_count)
        self._kept = np.zeros(class_count)
        self._weight = np.ones(class_count)

    @property
    def threshold(self) -> float:
        """The score a frame must exceed now."""
        return self._threshold

    def set_rate(self, rate: float) -> None:
        """Follows a budget that changed (0 stops uploads)."""
        self.rate = min(max(rate, 0.0), 1.0)

    def judge(self, probs: Probabilities, entropy: float | None = None) -> Verdict:
        entropy = entropy_of(probs) if entropy is None else entropy
        if not math.isfinite(entropy):
            return Verdict(False, 0.0, entropy, "not-finite")
        self._credit = min(self._credit + self.rate, float(self.settings.burst))
        predicted = int(probs.argmax())
        score = informativeness(entropy, self._log_classes, self.settings.peak) * float(self._weight[predicted])
        passes = score > self._threshold
        self._follow(score)
        self._wait -= 1
        if self._random.random() < self.rate * self.settings.unbiased:
            self._credit -= 1.0
            return Verdict(True, UNBIASED_SCORE, entropy, "random", True)
        if not passes:
            return Verdict(False, score, entropy, "below-threshold")
        if self._credit < 1.0:
            return Verdict(False, score, entropy, "rate")
        if self._wait >= 0:
            return Verdict(False, score, entropy, "spacing")
        self._credit -= 1.0
        self._wait = self.settings.spacing
        self._count(predicted)
        return Verdict(True, score, entropy, "kept")

    def _follow(self, score: float) -> None:
        """Puts a score into the window; every few frames, sets the threshold that the chosen share of the window exceeds."""
        size = len(self._scores)
        self._scores[self._seen % size] = score
        self._seen += 1
        if self._seen % (size // REFRESHES):
            return
        drawn = self.rate * self.settings.unbiased
        chosen = (self.rate - drawn) / (1.0 - drawn) if drawn < 1.0 else 0.0
        known = self._scores[: min(self._seen, size)]
        at = int((1.0 - chosen) * len(known))
        self._threshold = -1.0 if at == 0 else math.inf if at == len(known) else float(np.partition(known, at)[at])

    def _count(self, predicted: int) -> None:
        """Counts a kept class with decay, and makes the weights of all classes anew (kept frames are few)."""
        self._kept *= self._decay
        self._kept[predicted] += 1.0
        self._weight = ((self._kept.mean() + 1.0) / (self._kept + 1.0)) ** self.settings.balance
