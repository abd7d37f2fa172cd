"""ROID: soft likelihood ratio of certain and diverse images, agreement of two views, and a pull to the source parameters.

Marsden, Döbler and Yang, "Universal Test-time Adaptation through Weight Ensembling, Diversity Weighting, and Prior Correction"
(WACV 2024, arXiv 2306.00650); constants of mariodoebler/test-time-adaptation @8b2ed63. The prior correction changes
predictions, not parameters, and cannot be released: the modifier "label-shift" corrects the teachers' instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cloud.training.step import Context, Settings, Step, Strategy
from cloud.training.strategies.formulae import entropy, soft_likelihood_ratio, symmetric_cross_entropy, unit_range

__all__ = ["Roid", "RoidSettings", "diversity_weight"]


@dataclass(frozen=True)
class RoidSettings(Settings):
    """temperature: of the weights. momentum: of the mean prediction. pull: share of the exported values after each step."""

    temperature: float = 1 / 3
    momentum: float = 0.9
    pull: float = 0.01


def diversity_weight(logits: Tensor, mean: Tensor, temperature: float) -> Tensor:
    """e^(diversity · certainty / T), (n,); 0 where diversity is under the batch's mean.

    Diversity is 1 − cosine to the mean prediction (classes,), certainty −H; both scaled to 0..1 over the batch.
    """
    diversity = unit_range(1 - torch.nn.functional.cosine_similarity(mean[None], torch.softmax(logits, 1), dim=1))
    certainty = unit_range(-entropy(logits))
    weight = torch.exp(diversity * certainty / temperature)
    return torch.where(diversity < diversity.mean(), torch.zeros_like(weight), weight)


class Roid(Strategy[RoidSettings]):
    """See the module."""

    source: ClassVar[str] = "Marsden et al., WACV 2024, arXiv 2306.00650"
    formula: ClassVar[str] = "w (−Σ p ln(p/(1−p)) + SCE(p, p')), w = e^(3·diversity·certainty); θ ← 0.99 θ + 0.01 θ0"
    needs: ClassVar[frozenset[str]] = frozenset({"augmented"})
    settings_type: ClassVar[type] = RoidSettings

    def begin(self, context: Context) -> None:
        super().begin(context)
        self._mean = torch.full((context.classes,), 1 / context.classes)

    def loss(self, step: Step) -> Tensor:
        assert step.augmented is not None
        logits = step.student.logits
        weight = diversity_weight(logits.detach(), self._mean, self.settings.temperature)
        now = torch.softmax(logits.detach(), 1).mean(0)
        self._mean = self.settings.momentum * self._mean + (1 - self.settings.momentum) * now
        return step.mean(weight * (soft_likelihood_ratio(logits) + symmetric_cross_entropy(step.augmented.logits, logits)))

    def after(self) -> bool:
        with torch.no_grad():
            for p, source in zip(self.context.parameters, self.context.exported, strict=True):
                p.lerp_(source, self.settings.pull)
        return False
