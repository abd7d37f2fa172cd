"""Several teachers weighed image by image, by an aggregator learnt on domains made of the calibration slice.

Zhong et al., "Meta-DMoE: Adapting to Domain Shift by Meta-Distillation from Mixture-of-Experts" (NeurIPS 2022, arXiv
2210.03885) meta-learns a transformer that combines the features of experts. Teachers here are any networks, of which only
predictions are known, and there are two or three: the aggregator is attention over three values of each prediction,

    t = Σ_k a_k t_k,   a = softmax_k( w · (1 − H(t_k)/ln C,  Σ_c t_k[c] t̄[c],  max_c t_k[c]) ) over teachers k, t̄: their mean,

and w is learnt as there over many domains: the teachers' statistics are measured on each without labels, then w lowers the
cross-entropy to its labels. The domains are calibration images under random mixtures of contrast, brightness, smoothing and
noise. The student's inner step is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cloud.training.step import TargetModifier, TeacherPool

__all__ = ["TeacherWeights", "TeacherWeightsSettings", "aggregate", "degraded", "evidence", "fit"]

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
STEPS, RATE, DECAY = 100, 0.1, 1e-3  # of Adam on three numbers


@dataclass(frozen=True)
class TeacherWeightsSettings:
    """weights_domains: made domains. weights_images: calibration images in each. weights_seed: of both."""

    weights_domains: int = 4
    weights_images: int = 96
    weights_seed: int = 0


def evidence(votes: Tensor) -> Tensor:
    """Three values of each prediction, (teachers, n, 3), from votes (teachers, n, classes)."""
    entropy = -(votes * votes.clamp_min(1e-12).log()).sum(2) / np.log(max(votes.shape[2], 2))
    agreement = (votes * votes.mean(0)).sum(2)
    return torch.stack([1 - entropy, agreement, votes.max(2).values], 2)


def aggregate(votes: Tensor, w: Tensor) -> Tensor:
    """The weighed prediction, (n, classes), from votes (teachers, n, classes) and w (3,). w = 0: the mean."""
    attention = torch.softmax(evidence(votes) @ w, 0)
    return (attention[..., None] * votes).sum(0)


def fit(domains: list[tuple[Tensor, Tensor]]) -> Tensor:
    """w (3,) that lowers the cross-entropy of the weighed predictions on labelled domains: (votes, labels (n,)) each."""
    w = torch.zeros(3, requires_grad=True)
    optimiser = torch.optim.Adam([w], RATE)
    for _ in range(STEPS):
        picked = [aggregate(votes, w).gather(1, labels[:, None]).clamp_min(1e-6).log().mean() for votes, labels in domains]
        loss = DECAY * (w**2).sum() - torch.stack(picked).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return w.detach()


def degraded(images: U8, rng: np.random.Generator) -> U8:
    """The same random mixture of contrast, brightness, smoothing and noise for all images, uint8 (n, H, W, 3)."""
    x = images.astype(np.float32) / 255
    mean = x.mean((1, 2), keepdims=True)
    x = mean + (x - mean) * rng.uniform(0.2, 1.2) + rng.uniform(-0.2, 0.2)
    smooth = rng.uniform(0, 0.25)
    for axis in (1, 2):
        x = (1 - 2 * smooth) * x + smooth * (np.roll(x, 1, axis) + np.roll(x, -1, axis))
    x = x + rng.normal(0, rng.uniform(0, 0.12), x.shape)
    made: U8 = (x.clip(0, 1) * 255).round().astype(np.uint8)
    return made


class TeacherWeights(TargetModifier[TeacherWeightsSettings]):
    """See the module. With one teacher, or without labelled calibration images, predictions stay as they are."""

    source: ClassVar[str] = "after Zhong et al., NeurIPS 2022, arXiv 2210.03885"
    formula: ClassVar[str] = "t = Σ_k a_k t_k, a = softmax_k(w · confidence and agreement of teacher k), w meta-learnt"
    settings_type: ClassVar[type] = TeacherWeightsSettings

    def __init__(self, settings: TeacherWeightsSettings) -> None:
        super().__init__(settings)
        self._w: Tensor | None = None

    def combined(self, votes: F32, combined: F32, pool: TeacherPool) -> F32:
        if len(votes) < 2 or not len(pool.images) or len(pool.labels) != len(pool.images) or (pool.labels < 0).any():
            return combined
        if self._w is None:
            self._w = self._learnt(pool)
        return aggregate(torch.from_numpy(votes), self._w).numpy().astype(np.float32)

    def _learnt(self, pool: TeacherPool) -> Tensor:
        rng = np.random.default_rng(self.settings.weights_seed)
        domains = []
        for _ in range(self.settings.weights_domains):
            pick = rng.permutation(len(pool.images))[: self.settings.weights_images]
            votes = pool.votes(degraded(pool.images[pick], rng))
            domains.append((torch.from_numpy(votes), torch.from_numpy(pool.labels[pick])))
        return fit(domains)
