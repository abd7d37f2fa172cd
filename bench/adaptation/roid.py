"""ROID: Marsden, Döbler and Yang, "Universal Test-time Adaptation through Weight Ensembling, Diversity Weighting, and Prior
Correction" (WACV 2024, arXiv 2306.00650), on one fp32 network.

Checked against mariodoebler/test-time-adaptation @8b2ed63 for its constants: Adam 1e-3 and batch 200 on CIFAR-10-C, source
weight 0.01 a step, momentum 0.9 of the mean prediction, temperature 1/3, probabilities clipped at 0.99.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.adaptation.baselines import Tent
from bench.adaptation.nets import affine_parameters, entropy
from bench.adaptation.views import second_view

__all__ = ["ROID", "certainty_and_diversity", "prior_correction", "soft_likelihood_ratio", "symmetric_cross_entropy"]

CLIPPED = 0.99  # probability above which the likelihood ratio's gradient ends
TINY = 1e-5


def soft_likelihood_ratio(logits: Tensor) -> Tensor:
    """-Σ_c p_c ln(p_c / (1 - p_c)), one per row; unlike entropy its gradient does not vanish for sure predictions."""
    p = logits.softmax(1).clamp(max=CLIPPED)
    return -(p * (p / (1 - p) + TINY).log()).sum(1)


def symmetric_cross_entropy(a: Tensor, b: Tensor) -> Tensor:
    """Half of each of the two cross-entropies between two rows of logits, one per row."""
    log_a, log_b = a.log_softmax(1), b.log_softmax(1)
    return -0.5 * ((log_b.exp() * log_a).sum(1) + (log_a.exp() * log_b).sum(1))


def certainty_and_diversity(logits: Tensor, mean_probabilities: Tensor, temperature: float) -> Tensor:
    """Weight of each row: exp(diversity · certainty / temperature), 0 where diversity is under the batch's mean.

    Diversity is 1 - cosine to the mean prediction, certainty the negative entropy; each is scaled to [0, 1] over the batch.
    """
    diversity = 1 - torch.nn.functional.cosine_similarity(mean_probabilities[None], logits.softmax(1), dim=1)
    diversity, certainty = _unit_range(diversity), _unit_range(-entropy(logits))
    weight = (diversity * certainty / temperature).exp()
    return torch.where(diversity < diversity.mean(), torch.zeros_like(weight), weight)


def _unit_range(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp(min=1e-12)


def prior_correction(logits: Tensor) -> Tensor:
    """Log of the probabilities times the batch's smoothed class prior (section 3.4): (n, classes).

    The smoothing is max(1/n, 1/C) over the largest mean probability, so that a small or one-sided batch corrects less.
    """
    p = logits.softmax(1)
    prior = p.mean(0)
    smooth = max(1 / len(p), 1 / p.shape[1]) / prior.max()
    return p.log() + ((prior + smooth) / (1 + smooth * p.shape[1])).log()


class ROID(Tent):
    """Weighted soft likelihood ratio and consistency with a second view; after each step 1 % of the source's affine parameters
    comes back; answers are corrected by the batch's class prior.

    Args:
        seed: of the second views.
    """

    def __init__(
        self, net: nn.Module, *, lr: float = 1e-3, batch: int = 200, source: float = 0.01, momentum: float = 0.9,
        temperature: float = 1 / 3, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(net, lr=lr, batch=batch)
        self.source, self.momentum, self.temperature = source, momentum, temperature
        self.anchor = [p.detach().clone() for p in affine_parameters(self.net)]
        self.generator = torch.Generator().manual_seed(seed)
        self.mean_probabilities: Tensor | None = None

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        seen = logits.detach()
        if self.mean_probabilities is None:
            self.mean_probabilities = torch.full_like(seen[0], 1 / seen.shape[1])
        weight = certainty_and_diversity(seen, self.mean_probabilities, self.temperature)
        moved = seen.softmax(1).mean(0)
        self.mean_probabilities = self.momentum * self.mean_probabilities + (1 - self.momentum) * moved
        kept = torch.nonzero(weight).flatten()
        self.counts["frames_learnt_from"] = self.counts.get("frames_learnt_from", 0) + len(kept)
        if len(kept) > 1:  # statistics of one image say nothing
            views = self.net(second_view(x[kept], self.generator))
            loss = soft_likelihood_ratio(logits[kept]) + symmetric_cross_entropy(views, logits[kept])
            self.descend((weight[kept] * loss).sum() / len(x))
            with torch.no_grad():
                for p, a in zip(affine_parameters(self.net), self.anchor, strict=True):
                    p.lerp_(a, self.source)
        return prior_correction(seen)
