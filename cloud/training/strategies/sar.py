"""SAR: entropy of reliable images, minimised where it is flat, with a way back.

Niu et al., "Towards Stable Test-Time Adaptation in Dynamic Wild World" (ICLR 2023, arXiv 2302.12400); constants of
mr-eggplant/SAR. The sharpness-aware step is Foret et al. (ICLR 2021): gradient at θ + ρ g/‖g‖, applied at θ. The norms of the
last quarter of the network stay (the paper: layer 4 of a ResNet, blocks 9 to 11 of a ViT). The loss under which the model has
collapsed, 0.2, is stated for 1,000 classes and scaled here by ln C ÷ ln 1000.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cloud.training.step import Context, Settings, Step, Strategy
from cloud.training.strategies.formulae import MARGIN, entropy, reliable_below

__all__ = ["Sar", "SarSettings"]

MOMENTUM = 0.9  # of the second pass's loss


@dataclass(frozen=True)
class SarSettings(Settings):
    """margin: E0 ÷ ln C. sharpness: ρ. collapsed: moving loss in nats, at 1,000 classes, under which all goes back. skipped:
    share of the norms, the last ones, that stay."""

    margin: float = MARGIN
    sharpness: float = 0.05
    collapsed: float = 0.2
    skipped: float = 0.25


class Sar(Strategy[SarSettings]):
    """See the module."""

    source: ClassVar[str] = "Niu et al., ICLR 2023, arXiv 2302.12400"
    formula: ClassVar[str] = "mean over H < E0 of H, at θ + ρ g/‖g‖; back to the exported values when its moving mean < 0.2"
    settings_type: ClassVar[type] = SarSettings

    def begin(self, context: Context) -> None:
        super().begin(context)
        self.radius = self.settings.sharpness
        self._kept = torch.zeros(0, dtype=torch.bool)
        self._moving: float | None = None
        self._floor = self.settings.collapsed * math.log(max(context.classes, 2)) / math.log(1000)

    def trained(self, count: int) -> range:
        return range(max(count - round(count * self.settings.skipped), 1))

    def loss(self, step: Step) -> Tensor:
        h = entropy(step.student.logits)
        reliable = h.detach() < reliable_below(self.context.classes, self.settings.margin)
        self._kept = self._kept & reliable if step.again else reliable
        values = (step.weights * h)[self._kept]
        loss = values.sum() / max(len(values), 1)
        if step.again and len(values):
            now = float(loss.detach())
            self._moving = now if self._moving is None else MOMENTUM * self._moving + (1 - MOMENTUM) * now
        return loss

    def after(self) -> bool:
        if self._moving is None or self._moving >= self._floor:
            return False
        self._moving = None
        with torch.no_grad():
            for p, source in zip(self.context.parameters, self.context.exported, strict=True):
                p.copy_(source)
        return True
