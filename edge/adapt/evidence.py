"""What a domain's images have shown: moments of every norm's input, the images' class mix, and how many they stand for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge.adapt.support import Change

__all__ = ["Evidence"]

F64 = NDArray[np.float64]
UNCHANGED = Change()


class Evidence:
    """Moments of one domain.

    Attributes:
        moments: float64 (2, channels), mean and mean square of every norm's input (`refold.statistics.Layout`).
        frames: independent images they stand for; 0: nothing is known.
        mix: float64 (K,), the images' mix of class groups.
        change: of the images' answers behind statistics made of these moments.
    """

    def __init__(self, channels: int, groups: int) -> None:
        self.frames = 0.0
        self.moments: F64 = np.zeros((2, channels))
        self.mix: F64 = np.full(groups, 1 / groups)
        self.change = Change()

    @classmethod
    def of(cls, moments: F64, frames: float, mix: F64, change: Change = UNCHANGED) -> Evidence:
        found = cls(moments.shape[1], len(mix))
        found.moments, found.frames, found.mix, found.change = moments, frames, mix, change
        return found

    def copy(self) -> Evidence:
        """The same, to go its own way."""
        return Evidence.of(self.moments.copy(), self.frames, self.mix.copy(), self.change)

    def worth(self, most: float) -> Evidence:
        """The same moments, worth no more than so many images: older ones fade, so that slow drift is followed."""
        return Evidence.of(self.moments, min(self.frames, most), self.mix, self.change)
