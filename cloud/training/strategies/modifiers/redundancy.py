"""CEMA's selection of uploads as its authors released it, which is EATA's: reliable, and unlike the mean of those before.

Niu et al., ICML 2022 (arXiv 2204.02610); chenyaofo/CEMA @9a6ef17, conf/cema.conf. The images it leaves out count for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cloud.training.step import Context, Modifier, Step
from cloud.training.strategies.eata import MeanPrediction
from cloud.training.strategies.formulae import MARGIN, entropy, reliable_below

__all__ = ["Redundancy", "RedundancySettings"]


@dataclass(frozen=True)
class RedundancySettings:
    """redundancy_high: largest entropy ÷ ln C. redundancy_cosine: similarity from which an image is redundant: 0.4 with 10
    classes, 0.1 with 100; the released configuration, for 1,000, has 0.05."""

    redundancy_high: float = MARGIN
    redundancy_cosine: float = 0.4


class Redundancy(Modifier[RedundancySettings]):
    """See the module."""

    source: ClassVar[str] = "Niu et al., ICML 2022, arXiv 2204.02610; chenyaofo/CEMA @9a6ef17"
    formula: ClassVar[str] = "keep where H < 0.4 ln C and |cos(p, mean of kept p)| < ε"
    settings_type: ClassVar[type] = RedundancySettings

    def begin(self, context: Context) -> None:
        super().begin(context)
        self._mean = MeanPrediction(self.settings.redundancy_cosine)

    def weights(self, step: Step) -> Tensor:
        logits = step.student.logits.detach()
        reliable = entropy(logits) < reliable_below(self.context.classes, self.settings.redundancy_high)
        return self._mean.unlike(torch.softmax(logits, 1), reliable).float()
