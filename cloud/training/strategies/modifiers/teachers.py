"""The teachers' predictions beside a loss that has none: λ times the student's cross-entropy to them.

Strategies that come from test-time adaptation teach themselves. In the cloud there are teachers: this adds what they say, as
CEMA adds distillation to entropy (Chen et al., ICLR 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cloud.training.step import Modifier, Step
from cloud.training.strategies.formulae import cross_entropy

__all__ = ["TeacherTerm", "TeacherTermSettings"]


@dataclass(frozen=True)
class TeacherTermSettings:
    """teachers_weight: λ."""

    teachers_weight: float = 1.0


class TeacherTerm(Modifier[TeacherTermSettings]):
    """See the module."""

    source: ClassVar[str] = "Hinton et al., arXiv 1503.02531; beside a self-taught loss as in Chen et al., ICLR 2024"
    formula: ClassVar[str] = "+ λ (−Σ t ln p)"
    settings_type: ClassVar[type] = TeacherTermSettings

    def penalty(self, step: Step) -> Tensor:
        return self.settings.teachers_weight * step.mean(cross_entropy(step.teachers, step.student.logits))
