"""CEMA's selection of uploads as its paper describes it: entropies in a band whose upper end follows the mean entropy.

Chen et al., ICLR 2024, section on sample identification; the thresholds as chenyaofo/CEMA @9a6ef17 computes them:

    E_max = 0.4 ln C · (mean entropy of all seen ÷ that mean at the end of the warm-up) · λ,   E_min = 0.02 ln C
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cloud.training.step import Context, Modifier, Step
from cloud.training.strategies.formulae import MARGIN, entropy, reliable_below

__all__ = ["BandSettings", "EntropyBand"]


@dataclass(frozen=True)
class BandSettings:
    """band_high, band_low: E_max and E_min ÷ ln C. band_warm_up: images seen before E_max moves. band_factor: λ."""

    band_high: float = MARGIN
    band_low: float = 0.02
    band_warm_up: int = 640
    band_factor: float = 1.0


class EntropyBand(Modifier[BandSettings]):
    """See the module."""

    source: ClassVar[str] = "Chen et al., ICLR 2024, arXiv 2402.17316; chenyaofo/CEMA @9a6ef17"
    formula: ClassVar[str] = "keep where 0.02 ln C < H < 0.4 ln C · H̄/H̄0"
    settings_type: ClassVar[type] = BandSettings

    def begin(self, context: Context) -> None:
        super().begin(context)
        self._seen, self._total = 0, 0.0
        self._warm: float | None = None

    def bounds(self, h: Tensor) -> tuple[float, float]:
        """E_min and E_max, the batch's entropies (n,) taken in before they are judged."""
        s, classes = self.settings, self.context.classes
        self._seen, self._total = self._seen + len(h), self._total + float(h.sum())
        mean = self._total / self._seen
        if self._warm is None and self._seen >= s.band_warm_up:
            self._warm = mean
        high = reliable_below(classes, s.band_high)
        if self._warm:
            high *= mean / self._warm * s.band_factor
        return s.band_low * math.log(max(classes, 2)), high

    def weights(self, step: Step) -> Tensor:
        h = entropy(step.student.logits.detach())
        low, high = self.bounds(h)
        return ((h > low) & (h < high)).float()
