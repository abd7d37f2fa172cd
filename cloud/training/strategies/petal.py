"""PETAL: a mean teacher, a Gaussian posterior of the source as prior, and restoring of the least informed values.

Brahma and Rai, "A Probabilistic Framework for Lifelong Test-Time Adaptation" (CVPR 2023, arXiv 2212.09713); constants of
dhanajitb/petal. The paper trains all parameters and fits its posterior (SWAG, diagonal) while the source model is trained; here
gamma and beta move, and the posterior is of `fit_steps` steps of SGD on the bundle's labelled calibration slice from the
exported values. The teacher sees one view. What is released is the mean teacher, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cloud.training.step import Context, Settings, Step, Strategy
from cloud.training.strategies.formulae import cross_entropy, follow_average, squared_distance

__all__ = ["Petal", "PetalSettings", "least_informed", "posterior"]

FIT_BATCH = 64
VARIANCE_FLOOR = 1e-6


@dataclass(frozen=True)
class PetalSettings(Settings):
    """momentum: of the mean teacher. prior: weight of the posterior's energy; 1e-9 on CIFAR, 1e-11 on ImageNet. restored: share
    of the values, those with the smallest squared gradients, that go back; 0.03 on CIFAR, 0.003 on ImageNet. fit_steps,
    fit_rate: ours, of the SGD whose iterates the posterior is fitted to."""

    momentum: float = 0.999
    prior: float = 1e-9
    restored: float = 0.03
    fit_steps: int = 8
    fit_rate: float = 1e-3


def posterior(context: Context, steps: int, rate: float) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and variance of every parameter over SGD's iterates on calibration images (SWAG, Maddox et al. 2019, diagonal)."""
    x, targets = context.calibration(steps * FIT_BATCH)
    values = [p.clone() for p in context.exported]
    total, square = [torch.zeros_like(v) for v in values], [torch.zeros_like(v) for v in values]
    count = 0
    while count < max(steps, 1):
        if len(x):
            pick = torch.randint(0, len(x), (min(FIT_BATCH, len(x)),), generator=context.generator)
            part, wanted = x[pick], targets[pick]
            gradients = context.exported_gradients(part, lambda logits, w=wanted: cross_entropy(w, logits).mean(), values)  # type: ignore[misc]
            values = [v - rate * g for v, g in zip(values, gradients, strict=True)]
        for t, s, v in zip(total, square, values, strict=True):
            t += v
            s += v**2
        count += 1
    mean = [t / count for t in total]
    return mean, [(s / count - m**2).clamp_min(0) for s, m in zip(square, mean, strict=True)]


def least_informed(gradients: list[Tensor], share: float) -> list[Tensor]:
    """True where the squared gradient is below its quantile `share` over all parameters."""
    squared = [g**2 for g in gradients]
    limit = torch.quantile(torch.cat([s.flatten() for s in squared]), share)
    return [s < limit for s in squared]


class Petal(Strategy[PetalSettings]):
    """See the module."""

    source: ClassVar[str] = "Brahma and Rai, CVPR 2023, arXiv 2212.09713"
    formula: ClassVar[str] = "−Σ q ln p + λ ½ Σ (θ−μ)²/(σ²+1e-6), q: mean teacher; values with least gradient² go back"
    settings_type: ClassVar[type] = PetalSettings

    def begin(self, context: Context) -> None:
        super().begin(context)
        self._average = [p.detach().clone() for p in context.parameters]
        self._mean, variance = posterior(context, self.settings.fit_steps, self.settings.fit_rate)
        self._precision = [1 / (v + VARIANCE_FLOOR) for v in variance]

    def loss(self, step: Step) -> Tensor:
        taught = torch.softmax(self.context.answers(step.x, self._average).logits, 1)
        energy = 0.5 * squared_distance(self.context.parameters, self._mean, self._precision)
        return step.mean(cross_entropy(taught, step.student.logits)) + self.settings.prior * energy

    def after(self) -> bool:
        follow_average(self._average, self.context.parameters, self.settings.momentum)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.context.parameters]
        chosen = least_informed(gradients, self.settings.restored)
        with torch.no_grad():
            for p, source, back in zip(self.context.parameters, self.context.exported, chosen, strict=True):
                p.copy_(torch.where(back, source, p))
        return False

    def released(self) -> list[Tensor]:
        return [a.clone() for a in self._average]
