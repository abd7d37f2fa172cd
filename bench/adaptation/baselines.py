"""Published baselines on one fp32 network, no cloud: source, BN-1, α-BN, Tent, EATA, and the supervised bound (ROID: roid.py).

Implemented from the papers and the notes in the repository's specification; settings are each paper's CIFAR-10-C ones unless a
row says otherwise. All of them see the batch they are about to predict, which favours them over a device that gets one frame at
a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bench.adaptation.method import BatchMethod
from bench.adaptation.nets import Statistics, adaptable, affine_parameters, entropy

__all__ = ["EATA", "AlphaBN", "Source", "SupervisedOracle", "Tent", "fisher_information"]


class Source(BatchMethod):
    """No adaptation. With BATCH statistics: prediction-time batch norm ("BN-1")."""

    def __init__(
        self, net: nn.Module, statistics: Statistics = Statistics.SOURCE, *, batch: int = 200, alpha: float = 1.0
    ) -> None:
        self.net = adaptable(net, statistics, alpha)
        self.batch = batch

    @torch.no_grad()
    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


class AlphaBN(Source):
    """Source and batch statistics mixed; α = n / (n + prior) in Schneider et al. (2020), 0.5 in CEMA's comparison."""

    def __init__(self, net: nn.Module, *, alpha: float, batch: int = 200) -> None:
        super().__init__(net, Statistics.MIXED, batch=batch, alpha=alpha)


class Tent(BatchMethod):
    """Wang et al. 2021: batch statistics, and gamma and beta follow the gradient of the batch's mean entropy.

    `alpha` below 1 mixes the source's statistics in, as α-BN does; the paper has none of that. `optimiser` is "adam" (the
    paper's on CIFAR) or "sgd" (momentum 0.9, its optimiser on ImageNet).
    """

    def __init__(
        self, net: nn.Module, *, lr: float = 1e-3, batch: int = 200, alpha: float = 1.0, optimiser: str = "adam"
    ) -> None:
        self.net = adaptable(net, Statistics.BATCH if alpha == 1 else Statistics.MIXED, alpha)
        self.batch = batch
        parameters = affine_parameters(self.net)
        self.optimiser: torch.optim.Optimizer
        if optimiser == "sgd":
            self.optimiser = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
        else:
            self.optimiser = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999))

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        self.descend(entropy(logits).mean())
        return logits.detach()

    def descend(self, loss: Tensor) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()


def fisher_information(net: nn.Module, clean: Tensor, batch: int = 64) -> list[Tensor]:
    """Diagonal of EATA's Fisher matrix for each affine parameter: squared gradients of mini-batches against their own
    predictions, averaged over mini-batches (not over samples)."""
    parameters = affine_parameters(net)
    total = [torch.zeros_like(p) for p in parameters]
    parts = torch.split(clean, batch)
    for part in parts:
        logits = net(part)
        gradients = torch.autograd.grad(F.cross_entropy(logits, logits.detach().argmax(1)), parameters)
        total = [t + g.square() for t, g in zip(total, gradients, strict=True)]
    return [t / len(parts) for t in total]


class EATA(Tent):
    """Niu et al. 2022: Tent on reliable, non-redundant samples, weighted, held to the source by Fisher information.

    Args:
        clean: in-distribution inputs for the Fisher matrix, unlabelled; 2,000 in the paper.
        margin: share of ln C above which an entropy is unreliable.
        redundancy: |cosine| to the moving mean prediction above which a sample is redundant; 0.4 for ten classes.
        fisher: weight of the anti-forgetting term; 1 for CIFAR-10.
    """

    def __init__(
        self,
        net: nn.Module,
        clean: Tensor,
        *,
        lr: float = 1e-3,
        batch: int = 200,
        alpha: float = 1.0,
        margin: float = 0.4,
        redundancy: float = 0.4,
        fisher: float = 1.0,
        optimiser: str = "adam",
    ) -> None:
        super().__init__(net, lr=lr, batch=batch, alpha=alpha, optimiser=optimiser)
        self.margin, self.redundancy, self.fisher_weight = margin, redundancy, fisher
        self.anchor = [p.detach().clone() for p in affine_parameters(self.net)]
        self.fisher = fisher_information(self.net, clean)
        self.mean_probabilities: Tensor | None = None

    def select(self, logits: Tensor) -> Tensor:
        """Indices of the samples worth learning from; moves the mean prediction by them."""
        probabilities = logits.detach().softmax(1)
        kept = torch.nonzero(entropy(logits.detach()) < self.margin * math.log(logits.shape[1])).flatten()
        if self.mean_probabilities is not None and len(kept):
            cosine = F.cosine_similarity(self.mean_probabilities[None], probabilities[kept])
            kept = kept[cosine.abs() < self.redundancy]
        if len(kept):
            mean = probabilities[kept].mean(0)
            past = self.mean_probabilities
            self.mean_probabilities = mean if past is None else 0.9 * past + 0.1 * mean
        return kept

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        kept = self.select(logits)
        self.counts["frames_learnt_from"] = self.counts.get("frames_learnt_from", 0) + len(kept)
        if len(kept):
            h = entropy(logits[kept])
            weight = torch.exp(self.margin * math.log(logits.shape[1]) - h.detach())
            pull = sum(
                (f * (p - a).square()).sum()
                for f, p, a in zip(self.fisher, affine_parameters(self.net), self.anchor, strict=True)
            )
            self.descend((weight * h).mean() + self.fisher_weight * pull)
        return logits.detach()


class SupervisedOracle(Tent):
    """The bound of any norm-only method on these statistics: Tent's network and steps with the true label of every frame."""

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        self.descend(F.cross_entropy(logits, labels))
        return logits.detach()
