"""A second look: an unsure answer is averaged with the one for the mirrored image, within a share of the compute.

Averaging over flips is the usual test-time augmentation (Krizhevsky et al. 2012, section 4.1); here it is spent where it can
change something. A frame gets a second look when its entropy is among the highest `share` of the latest frames, above that of
a sure answer, and the looks so far stay within `share` of the frames: mean compute is at most 1 + share at any time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edge.adaptation.corrections.correction import F32

__all__ = ["SecondLook", "SecondLookSettings"]

REFRESHES = 16  # thresholds per window


@dataclass(frozen=True)
class SecondLookSettings:
    """Attributes:
        share: second looks per frame, at most.
        window: latest frames whose entropies tell what is unsure.
        sure: fraction of ln C below which an answer is sure whatever the others are (CEMA's E_min).
        saved: looks that a quiet time may save up for an unsure one.
    """  # fmt: skip

    share: float = 0.2
    window: int = 256
    sure: float = 0.02
    saved: float = 16.0


class SecondLook:
    """Decides, frame by frame, and averages. Not thread-safe."""

    def __init__(self, class_count: int, settings: SecondLookSettings | None = None) -> None:
        self.settings = settings or SecondLookSettings()
        self._least = self.settings.sure * math.log(max(class_count, 2))
        self._entropies = np.zeros(self.settings.window)
        self._threshold = self._least
        self._credit = 0.0
        self.frames = self.looks = 0

    def wants(self, entropy: float) -> bool:
        """Takes the next frame's entropy in nats; True when the mirrored image is to be looked at. NaN wants nothing."""
        s = self.settings
        self._credit = min(self._credit + s.share, s.saved)
        if not math.isfinite(entropy):
            self.frames += 1
            return False
        self._entropies[self.frames % s.window] = entropy
        self.frames += 1
        if self.frames % (s.window // REFRESHES) == 0:
            known = self._entropies[: min(self.frames, s.window)]
            at = min(int((1 - s.share) * len(known)), len(known) - 1)
            self._threshold = max(float(np.partition(known, at)[at]), self._least)
        if entropy <= self._threshold or self._credit < 1.0:
            return False
        self._credit -= 1.0
        self.looks += 1
        return True

    @staticmethod
    def average(first: F32, second: F32) -> F32:
        """The mean of two answers' probabilities, each float32 (C,); the first where the second is not finite."""
        mean: F32 = (first + second) * np.float32(0.5)
        return mean if math.isfinite(float(mean.sum())) else first

    def metrics(self) -> dict[str, float]:
        """Counters and gauges; any thread."""
        return {"second_looks": float(self.looks), "compute_ratio": 1.0 + self.looks / max(self.frames, 1)}
