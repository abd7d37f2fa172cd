"""Plain distillation: the student's cross-entropy to the teachers' predictions.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), at temperature 1 and without
labels. The strategy that every other one has to beat.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from cloud.training.step import Settings, Step, Strategy
from cloud.training.strategies.formulae import cross_entropy

__all__ = ["Distillation"]


class Distillation(Strategy[Settings]):
    """See the module."""

    source: ClassVar[str] = "Hinton et al., arXiv 1503.02531, at T = 1"
    formula: ClassVar[str] = "−Σ t ln p"
    moved: ClassVar[bool] = True
    settings_type: ClassVar[type] = Settings

    def loss(self, step: Step) -> Tensor:
        return step.mean(cross_entropy(step.teachers, step.student.logits))
