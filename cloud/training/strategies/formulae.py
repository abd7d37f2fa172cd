"""Formulae that several strategies share. All take logits (n, classes) and give one value per row, in nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "confidence_weight",
    "cross_entropy",
    "entropy",
    "follow_average",
    "reliable_below",
    "soft_likelihood_ratio",
    "squared_distance",
    "symmetric_cross_entropy",
    "unit_range",
]

MARGIN = 0.4  # times ln C: entropy below which EATA, SAR and CEMA call a prediction reliable
CLIPPED = 0.99  # probability above which the soft likelihood ratio's gradient ends (ROID)


def reliable_below(classes: int, share: float = MARGIN) -> float:
    """E0 = share · ln C (EATA)."""
    return share * math.log(max(classes, 2))


def entropy(logits: Tensor) -> Tensor:
    """H(p) = −Σ p ln p."""
    log_p = torch.log_softmax(logits, 1)
    return -(log_p.exp() * log_p).sum(1)


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """−Σ t ln p, for target probabilities (n, classes)."""
    return -(target * torch.log_softmax(logits, 1)).sum(1)


def symmetric_cross_entropy(a: Tensor, b: Tensor) -> Tensor:
    """−½ Σ b ln a − ½ Σ a ln b, between two rows of logits (RMT)."""
    log_a, log_b = torch.log_softmax(a, 1), torch.log_softmax(b, 1)
    return -0.5 * ((log_b.exp() * log_a).sum(1) + (log_a.exp() * log_b).sum(1))


def soft_likelihood_ratio(logits: Tensor) -> Tensor:
    """−Σ p ln(p / (1 − p)), p clipped at 0.99 (ROID)."""
    p = torch.softmax(logits, 1).clamp(max=CLIPPED)
    return -(p * (p / (1 - p) + 1e-5).log()).sum(1)


def confidence_weight(h: Tensor, threshold: float, cap: float = math.inf) -> Tensor:
    """min(e^(E0 − H), cap), without gradient (EATA, CEMA)."""
    return torch.exp(threshold - h).clamp(max=cap).detach()


def unit_range(values: Tensor) -> Tensor:
    """Values scaled to 0..1 over the batch; all 0 where they are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp_min(1e-12)


def squared_distance(parameters: list[Tensor], centre: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Σ_i w_i (θ_i − c_i)² over all tensors: a scalar with gradient to θ."""
    parts = [(w * (p - c) ** 2).sum() for p, c, w in zip(parameters, centre, weights, strict=True)]
    return torch.stack(parts).sum()


def follow_average(average: list[Tensor], parameters: list[Tensor], momentum: float) -> None:
    """θ' ← m θ' + (1 − m) θ, in place (mean teacher)."""
    with torch.no_grad():
        for a, p in zip(average, parameters, strict=True):
            a.mul_(momentum).add_(p, alpha=1 - momentum)
