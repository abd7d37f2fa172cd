"""RMT: symmetric cross-entropy to a mean teacher, contrast of features around source prototypes, and replay of source images.

Döbler, Marsden and Yang, "Robust Mean Teacher for Continual and Gradual Test-Time Adaptation" (CVPR 2023, arXiv 2211.13081).
The paper trains all parameters and warms up on 50,000 source images; here gamma and beta move, from the exported values on. The
contrast has no projector, which would have to be trained on the source; the source images are the bundle's calibration slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cloud.training.step import Context, Settings, Step, Strategy
from cloud.training.strategies.formulae import cross_entropy, follow_average, symmetric_cross_entropy

__all__ = ["Rmt", "RmtSettings", "contrast", "prototypes"]


@dataclass(frozen=True)
class RmtSettings(Settings):
    """momentum: of the mean teacher. contrast, replay: weights of the two terms. temperature: of the contrast. images:
    calibration images behind the prototypes."""

    momentum: float = 0.999
    contrast: float = 1.0
    replay: float = 1.0
    temperature: float = 0.1
    images: int = 512


def prototypes(features: Tensor, targets: Tensor) -> Tensor:
    """Mean feature of each class, (classes met, d), from features (m, d) and targets (m, classes)."""
    labels = targets.argmax(1)
    return torch.stack([features[labels == c].mean(0) for c in torch.unique(labels)])


def contrast(views: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss of v views of n images each, (v, n, d): every view's mean −ln share of its own image.

    L = −1/(vn) Σ_i 1/(v−1) Σ_{j: same image} ln( e^{z_i·z_j/τ} / Σ_{k≠i} e^{z_i·z_k/τ} ), z of length 1 (section 3.2).
    """
    v, n, d = views.shape
    z = torch.nn.functional.normalize(views.reshape(v * n, d), dim=1)
    itself = torch.eye(v * n, dtype=torch.bool)
    log_share = torch.log_softmax((z @ z.T / temperature).masked_fill(itself, float("-inf")), 1)
    image = torch.arange(n).repeat(v)
    positive = (image[:, None] == image[None]) & ~itself
    return -log_share.masked_fill(~positive, 0).sum() / (v * n * (v - 1))


class Rmt(Strategy[RmtSettings]):
    """See the module."""

    source: ClassVar[str] = "Döbler et al., CVPR 2023, arXiv 2211.13081"
    formula: ClassVar[str] = "½ SCE(p, q) + ½ SCE(p', q) + contrast(prototype, f, f') + CE(source images), q: mean teacher"
    needs: ClassVar[frozenset[str]] = frozenset({"augmented", "replay", "features"})
    settings_type: ClassVar[type] = RmtSettings

    def begin(self, context: Context) -> None:
        super().begin(context)
        self._average = [p.detach().clone() for p in context.parameters]
        x, targets = context.calibration(self.settings.images)
        self._prototypes = prototypes(context.exported_answers(x).known_features, targets) if len(x) else None

    def loss(self, step: Step) -> Tensor:
        assert step.augmented is not None
        taught = self.context.answers(step.x, self._average).logits
        own, other = step.student, step.augmented
        loss = 0.5 * step.mean(symmetric_cross_entropy(own.logits, taught) + symmetric_cross_entropy(other.logits, taught))
        if self._prototypes is not None and self.settings.contrast:
            f, g = own.known_features, other.known_features
            unit = torch.nn.functional.normalize
            nearest = (unit(f.detach(), dim=1) @ unit(self._prototypes, dim=1).T).argmax(1)
            views = torch.stack([self._prototypes[nearest], f, g])
            loss = loss + self.settings.contrast * contrast(views, self.settings.temperature)
        if step.replay is not None:
            answers, targets = step.replay
            loss = loss + self.settings.replay * cross_entropy(targets, answers.logits).mean()
        return loss

    def after(self) -> bool:
        follow_average(self._average, self.context.parameters, self.settings.momentum)
        return False
