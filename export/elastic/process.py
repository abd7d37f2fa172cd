"""Gaussian process regression of log error on rounding noise: what a few hundred measured pairs can teach.

An error of b bits has a power in proportion to 4^-b, and small errors of many places add up in the logits. So the logarithm of
the error rate is nearly linear in these powers, one for each layer and each value, and in what granularity and symmetry make of
them; a squared exponential kernel takes up what is left. A network must find this out from one-hot bit-widths, for which EQ-Net
measures thousands of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from export.elastic.genome import Genome

__all__ = ["NoiseProcess", "powers"]

F64 = NDArray[np.float64]
NOISE = 0.6  # variance of what is measured, of a signal's 1: 500 pictures' chance, and what the kernel cannot follow
LENGTH = 1.0  # of the kernel, in root mean square distance of standardised features
LEAST = 1e-3  # error rate that is told from none


def powers(genome: Genome) -> F64:
    """float64 features: the form, the noise of every place, and that again where the form is finer or symmetric."""
    form = np.array([genome.form.per_channel, genome.form.weight_symmetric, genome.form.activation_symmetric], float)
    w, a = (4.0 ** (2 - np.asarray(bits, float)) for bits in (genome.weight_bits, genome.activation_bits))
    return np.concatenate([form, w, a, form[0] * w, form[1] * w, form[2] * a])


class NoiseProcess:
    """Fitted on measured pairs when it is made."""

    def __init__(self, genomes: Sequence[Genome], accuracies: Sequence[float]) -> None:
        x = np.stack([powers(g) for g in genomes])
        self.mean, self.spread = x.mean(0), x.std(0) + 1e-6
        self.x = (x - self.mean) / self.spread
        target = np.log(np.maximum(1 - np.asarray(accuracies, float), LEAST))
        self.level, self.scale = float(target.mean()), max(float(target.std()), 1e-6)
        kernel = self._kernel(self.x) + NOISE * np.eye(len(x))
        self.dual = np.linalg.solve(kernel, (target - self.level) / self.scale)

    def _kernel(self, x: F64) -> F64:
        product = x @ self.x.T / x.shape[1]
        own, others = (np.square(v).mean(1) for v in (x, self.x))
        squared = np.maximum(own[:, None] + others[None] - 2 * product, 0)
        return np.asarray(np.exp(-squared / (2 * LENGTH**2)) + product)

    def __call__(self, genomes: Sequence[Genome]) -> NDArray[np.float32]:
        """Accuracies, float32 (n,)."""
        x = (np.stack([powers(g) for g in genomes]) - self.mean) / self.spread
        log_error = self._kernel(x) @ self.dual * self.scale + self.level
        return np.asarray(1 - np.exp(log_error), np.float32)
