"""CEMA's loss of the student: its own entropy, the teachers' distribution, and the teachers' label.

Chen et al., "Towards Robust and Efficient Cloud-Edge Elastic Model Adaptation via Selective Entropy Distillation" (ICLR 2024,
arXiv 2402.17316); weights and values of chenyaofo/CEMA @9a6ef17. Here in the shared loop: the teachers are adapted by
statistics instead of entropy steps, and the norms have measured statistics instead of batch renormalisation. CEMA's own loop is
the recipe "cema-paper"; its two selections of uploads are the modifiers "entropy-band" and "redundancy".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cloud.training.step import Settings, Step, Strategy
from cloud.training.strategies.formulae import confidence_weight, entropy, reliable_below

__all__ = ["Cema", "CemaSettings", "terms"]

TINY = 1e-12


def terms(logits: Tensor, target: Tensor, threshold: float, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weighed entropy, divergence and label terms, each (n,).

    Args:
        logits: the student's, (n, classes).
        target: the teachers' probabilities, (n, classes).
        threshold: entropy in nats at which an image weighs 1.
        cap: largest weight.
    """
    log_target = torch.log(target.clamp_min(TINY))
    weight = confidence_weight(-(target * log_target).sum(1), threshold, cap)
    log_p = torch.log_softmax(logits, 1)
    own = entropy(logits)
    divergence = (target * (log_target - log_p)).sum(1)
    label = torch.nn.functional.nll_loss(log_p, target.argmax(1), reduction="none")
    return confidence_weight(own, threshold, cap) * own, weight * divergence, weight * label


@dataclass(frozen=True)
class CemaSettings(Settings):
    """Weights of the three terms, and the largest weight of one image (ours: e^(0.4 ln 1000) is 15.8)."""

    alpha: float = 3.0
    beta: float = 3.0
    gamma: float = 1.0
    cap: float = 16.0


class Cema(Strategy[CemaSettings]):
    """See the module."""

    source: ClassVar[str] = "Chen et al., ICLR 2024, arXiv 2402.17316; values of chenyaofo/CEMA @9a6ef17"
    formula: ClassVar[str] = "α e^(E0−H(p)) H(p) + e^(E0−H(t)) (β KL(t‖p) − γ ln p[argmax t]), E0 = 0.4 ln C"
    moved: ClassVar[bool] = True
    settings_type: ClassVar[type] = CemaSettings

    def loss(self, step: Step) -> Tensor:
        s, threshold = self.settings, reliable_below(self.context.classes)
        own, divergence, label = terms(step.student.logits, step.teachers, threshold, s.cap)
        return s.alpha * step.mean(own) + s.beta * step.mean(divergence) + s.gamma * step.mean(label)
