"""CAFA: features near their own class's source distribution and far from the others'.

Jung et al., "CAFA: Class-Aware Feature Alignment for Test-Time Adaptation" (ICCV 2023, arXiv 2206.00205): Mahalanobis distances
D of the penultimate features to class-wise Gaussians of the source, the student's own answer as class,

    L = ln( mean_i D(f_i; class ŷ_i) ) − ln( mean_i Σ_{c≠ŷ_i} D(f_i; class c) ).

The Gaussians are of the bundle's calibration slice behind the exported norms. Each covariance is drawn to the mean of all by
the share `cafa_shrinkage`, ours: 200 images a class do not fill a covariance of 64 features. The paper uses the loss alone;
here it is added to a strategy's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cloud.training.step import Context, Modifier, Step
from refold.errors import ModelError

__all__ = ["Cafa", "CafaSettings", "alignment", "gaussians"]

RIDGE = 1e-3  # of the mean variance, on the diagonal: features that are always 0 have none


@dataclass(frozen=True)
class CafaSettings:
    """cafa_weight: of the term. cafa_images: calibration images behind the Gaussians. cafa_shrinkage: share of the pooled
    covariance in each class's."""

    cafa_weight: float = 1.0
    cafa_images: int = 1024
    cafa_shrinkage: float = 0.5


def gaussians(features: Tensor, targets: Tensor, shrinkage: float) -> tuple[Tensor, Tensor, Tensor]:
    """Classes met (k,), their means (k, d) and precisions (k, d, d), from features (m, d) and targets (m, classes)."""
    labels = targets.argmax(1)
    classes = torch.unique(labels)
    means = torch.stack([features[labels == c].mean(0) for c in classes])
    scatter = torch.stack([torch.cov(features[labels == c].T, correction=0) for c in classes])
    scatter = scatter.reshape(len(classes), features.shape[1], features.shape[1])
    mixed = (1 - shrinkage) * scatter + shrinkage * scatter.mean(0)
    ridge = RIDGE * mixed.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    identity = torch.eye(features.shape[1])
    return classes, means, torch.linalg.inv(mixed + ridge.view(-1, 1, 1) * identity)


def alignment(features: Tensor, own: Tensor, means: Tensor, precisions: Tensor) -> Tensor:
    """The loss of the module's formula, for features (n, d) whose class is number `own` (n,) of k classes."""
    apart = features[:, None] - means[None]
    distance = torch.einsum("nkd,kde,nke->nk", apart, precisions, apart)
    itself = torch.nn.functional.one_hot(own, len(means)).bool()
    return distance[itself].mean().clamp_min(1e-12).log() - distance.masked_fill(itself, 0).sum(1).mean().clamp_min(1e-12).log()


class Cafa(Modifier[CafaSettings]):
    """See the module. Raises ModelError at the start when the calibration slice shows fewer than two classes."""

    source: ClassVar[str] = "Jung et al., ICCV 2023, arXiv 2206.00205"
    formula: ClassVar[str] = "+ λ (ln mean D(f; ŷ) − ln mean Σ_{c≠ŷ} D(f; c)), D: Mahalanobis distance to source classes"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    settings_type: ClassVar[type] = CafaSettings

    def begin(self, context: Context) -> None:
        super().begin(context)
        x, targets = context.calibration(self.settings.cafa_images)
        if not len(x) or len(torch.unique(targets.argmax(1))) < 2:
            raise ModelError("CAFA needs calibration images of two classes or more: export the bundle with some.")
        features = context.exported_answers(x).known_features
        self._classes, self._means, self._precisions = gaussians(features, targets, self.settings.cafa_shrinkage)

    def penalty(self, step: Step) -> Tensor:
        own = step.student.logits.detach()[:, self._classes].argmax(1)
        return self.settings.cafa_weight * alignment(step.student.known_features, own, self._means, self._precisions)
