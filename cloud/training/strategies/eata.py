"""EATA: entropy of reliable, not redundant images, anchored where the source model's answers are sensitive.

Niu et al., "Efficient Test-Time Model Adaptation without Forgetting" (ICML 2022, arXiv 2204.02610); constants of
mr-eggplant/EATA and, for CIFAR, of mariodoebler/test-time-adaptation @8b2ed63. The Fisher information is of whole mini-batches
(64 calibration images, the exported model's own labels), as in the released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cloud.training.step import Context, Settings, Step, Strategy
from cloud.training.strategies.formulae import MARGIN, confidence_weight, entropy, reliable_below, squared_distance

__all__ = ["Eata", "EataSettings", "MeanPrediction", "fisher"]

FISHER_BATCH = 64
MOMENTUM = 0.9  # of the mean prediction


@dataclass(frozen=True)
class EataSettings(Settings):
    """margin: E0 ÷ ln C. cosine: similarity to the mean prediction above which an image is redundant; 0.4 with 10 classes
    (0.1 with 100, 0.05 with 1,000). anchor: weight of the Fisher term; 1 on CIFAR, 2,000 on ImageNet. images: calibration
    images behind the Fisher information; 500 suffice (EATA issue 3)."""

    margin: float = MARGIN
    cosine: float = 0.4
    anchor: float = 1.0
    images: int = 512


class MeanPrediction:
    """The moving mean of kept predictions, and which images are unlike it."""

    def __init__(self, cosine: float) -> None:
        self._cosine = cosine
        self.mean: Tensor | None = None

    def unlike(self, probabilities: Tensor, kept: Tensor) -> Tensor:
        """`kept`, bool (n,), less the redundant ones; the mean follows what is left. The first batch is kept whole."""
        if self.mean is not None:
            similar = torch.nn.functional.cosine_similarity(self.mean[None], probabilities, dim=1)
            kept = kept & (similar.abs() < self._cosine)
        if kept.any():
            mean = probabilities[kept].mean(0)
            self.mean = mean if self.mean is None else MOMENTUM * self.mean + (1 - MOMENTUM) * mean
        return kept


def fisher(context: Context, count: int) -> list[Tensor]:
    """Mean over mini-batches of the squared gradient of the cross-entropy to the exported model's own labels; empty bundle:
    0."""
    x, _ = context.calibration(count)
    total = [torch.zeros_like(p) for p in context.exported]
    batches = torch.split(x, FISHER_BATCH) if len(x) else ()
    for part in batches:
        gradients = context.exported_gradients(
            part, lambda logits: torch.nn.functional.cross_entropy(logits, logits.detach().argmax(1)), context.exported
        )
        for t, g in zip(total, gradients, strict=True):
            t += g**2 / len(batches)
    return total


class Eata(Strategy[EataSettings]):
    """See the module."""

    source: ClassVar[str] = "Niu et al., ICML 2022, arXiv 2204.02610"
    formula: ClassVar[str] = "mean over kept of e^(E0−H) H, + β Σ F (θ−θ0)²; kept: H < E0 and |cos(p, mean p)| < ε"
    settings_type: ClassVar[type] = EataSettings

    def begin(self, context: Context) -> None:
        super().begin(context)
        self._fisher = fisher(context, self.settings.images)
        self._mean = MeanPrediction(self.settings.cosine)

    def loss(self, step: Step) -> Tensor:
        threshold = reliable_below(self.context.classes, self.settings.margin)
        h = entropy(step.student.logits)
        kept = self._mean.unlike(torch.softmax(step.student.logits.detach(), 1), h.detach() < threshold)
        values = (step.weights * confidence_weight(h, threshold) * h)[kept]
        anchor = squared_distance(self.context.parameters, self.context.exported, self._fisher)
        return values.sum() / max(len(values), 1) + self.settings.anchor * anchor
