"""Return home: tells within a few frames that the images look again as those the bundle was exported for.

A cumulative sum of log-likelihood ratios (Page 1954) of the features under the home domain and under the present one, both
Gaussian with the covariance of the calibration images. Its alarms come exp(LIMIT) frames apart at least while the present
domain goes on (Lorden 1971). Serving the exported state again is always safe, so no further frames need confirm it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge.adapt.features import FEATURES, Reference

__all__ = ["HomeReturn"]

F64 = NDArray[np.float64]
LIMIT = 12.0  # nats
SINGLE = 4.0  # nats, that one frame says at most: features have longer tails than a Gaussian's
MOST = 16.0  # nats
SUSPICION = 3.0  # nats, from which every frame is to be watched
ALIKE = 2.5  # of the distance that chance puts between the mean of some frames and home


class HomeReturn:
    """Watches one domain at a time, other than home.

    Args:
        reference: how features look in the home domain.
        floor: squared distance per feature below which two means are the same.
    """

    def __init__(self, reference: Reference, floor: float) -> None:
        self._reference, self._floor = reference, floor
        self.restart(reference.mean)

    def restart(self, home: F64) -> None:
        """A domain begins; `home`: the mean features of the home domain, float64 (FEATURES,)."""
        self._home = home
        self._clear()

    def _clear(self) -> None:
        self._score, self._sum, self._count = 0.0, np.zeros(FEATURES), 0.0

    @property
    def suspicious(self) -> bool:
        """Whether a return may have begun."""
        return self._score > SUSPICION

    def watch(self, values: F64, present: F64, frames: float, independent: float) -> bool:
        """Takes one frame; whether the domain is home again. A third domain, nearer to home than to the present one, is not.

        Args:
            values: its features, float64 (FEATURES,).
            present: the present domain's mean features, from so many `frames`.
            independent: 0..1, what a frame counts for beside neighbours that resemble it.
        """
        far, near = (FEATURES * self._reference.distance(values, mean) for mean in (present, self._home))
        # A mean of few frames is itself off, which makes every frame look farther from it than it is.
        gain = 0.5 * (far - near - FEATURES / max(frames, 1.0))
        self._score = min(self._score + independent * float(np.clip(gain, -SINGLE, SINGLE)), MOST)
        if self._score <= 0:
            self._clear()
            return False
        self._sum += independent * values
        self._count += independent
        if self._score <= LIMIT:
            return False
        distance = self._reference.distance(self._sum / self._count, self._home)
        return distance < self._floor + ALIKE / max(self._count, 1.0)
