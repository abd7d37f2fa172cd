"""CoTTA: a mean teacher, its predictions averaged over views where the source model is unsure, and random restoring.

Wang et al., "Continual Test-Time Domain Adaptation" (CVPR 2022, arXiv 2203.13591). The paper trains all parameters; here gamma
and beta alone move, are averaged and are restored. Its 32 views are colour changes, moves, blur and noise; here they are the
mirror images and moves of `cloud.distil.augment`. What is released is the mean teacher, as in the paper; its statistics during
training are the student's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cloud.training.step import Context, Settings, Step, Strategy
from cloud.training.strategies.formulae import cross_entropy, follow_average

__all__ = ["Cotta", "CottaSettings"]


@dataclass(frozen=True)
class CottaSettings(Settings):
    """momentum: of the mean teacher. views: averaged where the exported model's mean confidence is under `sure` (0.92 with 10
    classes, 0.72 with 100, 0.1 on ImageNet). restored: share of values that go back to the exported ones after a step."""

    momentum: float = 0.999
    views: int = 32
    sure: float = 0.92
    restored: float = 0.01


class Cotta(Strategy[CottaSettings]):
    """See the module."""

    source: ClassVar[str] = "Wang et al., CVPR 2022, arXiv 2203.13591"
    formula: ClassVar[str] = "−Σ q ln p, q: mean teacher; each value back to the exported one with probability 0.01"
    needs: ClassVar[frozenset[str]] = frozenset({"exported"})
    settings_type: ClassVar[type] = CottaSettings

    def begin(self, context: Context) -> None:
        super().begin(context)
        self._average = [p.detach().clone() for p in context.parameters]

    def loss(self, step: Step) -> Tensor:
        assert step.exported is not None
        confidence = float(torch.softmax(step.exported, 1).max(1).values.mean())
        if confidence < self.settings.sure and self.settings.views:
            views = [self.context.augment(step.x) for _ in range(self.settings.views)]
            logits = torch.stack([self.context.answers(v, self._average).logits for v in views]).mean(0)
        else:
            logits = self.context.answers(step.x, self._average).logits
        return step.mean(cross_entropy(torch.softmax(logits, 1), step.student.logits))

    def after(self) -> bool:
        follow_average(self._average, self.context.parameters, self.settings.momentum)
        with torch.no_grad():
            for p, source in zip(self.context.parameters, self.context.exported, strict=True):
                back = torch.rand(p.shape, generator=self.context.generator) < self.settings.restored
                p.copy_(torch.where(back, source, p))
        return False

    def released(self) -> list[Tensor]:
        return [a.clone() for a in self._average]
