"""Weight distribution regularisation (EQ-Net eq. 4-6): weights spread like a uniform distribution lose least to any step.

Skew(w) = E[((w - mu) / sd)^3] towards 0,   Kurt(w) = E[((w - mu) / sd)^4] towards 1.8, that of a uniform distribution
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["KURTOSIS", "kurtosis_term", "skewness_term", "weight_distribution_loss"]

KURTOSIS = 1.8
KURTOSIS_WEIGHT, SKEWNESS_WEIGHT = 0.015, 1.0  # the published code's


def _standard(w: Tensor) -> Tensor:
    return (w - w.mean()) / w.std().clamp_min(1e-12)


def kurtosis_term(weights: Sequence[Tensor]) -> Tensor:
    """Mean over layers of |Kurt - 1.8|²; the whole tensor's statistics, unbiased deviation."""
    return torch.stack([((_standard(w) ** 4).mean() - KURTOSIS) ** 2 for w in weights]).mean()


def skewness_term(weights: Sequence[Tensor]) -> Tensor:
    """Mean over layers of |Skew|²."""
    return torch.stack([(_standard(w) ** 3).mean() ** 2 for w in weights]).mean()


def weight_distribution_loss(
    weights: Sequence[Tensor], kurtosis: float = KURTOSIS_WEIGHT, skewness: float = SKEWNESS_WEIGHT
) -> Tensor:
    """kurtosis * kurtosis term + skewness * skewness term."""
    return kurtosis * kurtosis_term(weights) + skewness * skewness_term(weights)
