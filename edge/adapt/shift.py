"""Shift detector: tells, frame by frame, that the domain is no longer the one it was.

Moving averages of the features, a quick one for large shifts and slower ones for small, are compared with the present
domain's mean. Distances are measured in units of their own sampling variance, so that one threshold serves all; neighbouring
frames that resemble each other (a video) count for fewer frames, by their measured correlation.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from edge.adapt.features import FEATURES, Reference
from edge.adapt.settings import AdaptSettings

__all__ = ["ShiftDetector"]

F64 = NDArray[np.float64]
RATES = (0.22, 0.05, 0.0125, 0.005)  # averages over about 8, 39, 159 and 399 frames; JPEG artefacts need the last
CORRELATION_RATE = 0.02  # about the last 50 pairs of neighbours
LAG, KNOWN_LAG = 32, 400  # frames; the second for a mean known from many, which can wait for the slowest average
LONGEST = 2048.0  # frames a mean is worth at most: it follows slow drift


class ShiftDetector:
    """Watches one domain at a time. Not thread-safe; no clock, no I/O.

    Attributes:
        distance: of the slowest average from the present domain's mean.
        pressure: of the average that is nearest to an alarm, its distance over what would be one.
    """

    def __init__(self, settings: AdaptSettings, reference: Reference) -> None:
        self._settings = settings
        self.reference = reference
        self.restart(reference.mean, float(reference.frames))

    def restart(self, mean: F64, frames: float) -> None:
        """From now on the present domain is the one with this mean, known from so many frames."""
        self._averages = [mean.copy() for _ in RATES]
        self._ages = [0] * len(RATES)
        self._recent: deque[F64] = deque()
        self._last: F64 | None = None
        self._correlation = 0.0
        self.mean = mean.copy()
        self.frames = frames
        self.distance = 0.0
        self.pressure = 0.0

    def learn(self, values: F64) -> None:
        """Counts one frame into the present domain's mean, some frames later: what is being judged must not move the judge."""
        self._recent.append(values)
        if len(self._recent) <= max(LAG, min(self.frames / 5, KNOWN_LAG)):
            return
        values = self._recent.popleft()
        self.frames = min(self.frames + 1, LONGEST)
        self.mean += (values - self.mean) / self.frames

    def watch(self, values: F64) -> float:
        """Takes one frame's features, float64 (FEATURES,); how many frames say that the domain has changed, or 0."""
        self._correlate(values)
        shrink = self.independent
        alarm = pressure = 0.0
        for i, rate in enumerate(RATES):
            self._ages[i] += 1
            step = max(rate, 1.0 / self._ages[i])  # a plain mean until it is as long as the average's memory
            self._averages[i] += step * (values - self._averages[i])
            counted = min(self._ages[i], (2 - rate) / rate)
            distance = self.reference.distance(self._averages[i], self.mean)
            noise = 1.0 / max(counted * shrink, 1.0) + 1.0 / max(self.frames, 1.0)
            limit = self._settings.shift_threshold * noise + self._settings.shift_floor
            pressure = max(pressure, distance / limit)
            if self._ages[i] >= 3 and distance > limit:
                alarm = alarm or counted
            self.distance = distance
        self.pressure = pressure
        return alarm

    @property
    def independent(self) -> float:
        """0..1: how many independent frames one frame is worth."""
        correlation = min(max(self._correlation, 0.0), 0.98)
        return (1 - correlation) / (1 + correlation)

    def _correlate(self, values: F64) -> None:
        if self._last is not None:
            a, b = values - self.mean, self._last - self.mean
            precision = self.reference.precision
            size = np.sqrt(max(float(a @ precision @ a) * float(b @ precision @ b), 1e-12))
            pair = float(a @ precision @ b) / max(float(size), float(FEATURES))
            self._correlation += CORRELATION_RATE * (pair - self._correlation)
        self._last = values
