"""LAME: answers of frames that resemble each other are drawn together (Boudiaf et al., CVPR 2022, arXiv 2201.05718).

Over the latest N frames it minimises, each row z_i on the simplex,

    Σ_i KL(z_i ‖ p_i) - Σ_ij w_ij z_i·z_j       by       z_i ← softmax(ln(p_i + 1e-10) + Σ_j w_ij z_j)

The paper answers a batch at once; here the newest frame of a sliding window is answered and the others stay as they were
answered. Affinities are the paper's default, a Gaussian whose bandwidth is the mean distance to the k-th nearest frame
(k = 5, itself counted, self-affinity kept), of logits at length 1 in place of features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge.adaptation.corrections.correction import F32, F64
from refold.softmax import softmax_rows

__all__ = ["Lame", "LameSettings", "laplacian_answers", "rbf_affinity", "squared_distances"]


@dataclass(frozen=True)
class LameSettings:
    """The paper's and its repository's numbers (fiveai/LAME, `overall_best`).

    Attributes:
        window: frames that are answered together, the paper's batch.
        neighbours: k of the bandwidth.
        iterations: most steps of the fixed point.
        tolerance: relative change of the energy that ends them.
    """

    window: int = 64
    neighbours: int = 5
    iterations: int = 100
    tolerance: float = 1e-8


def rbf_affinity(squared: F64, neighbours: int) -> F64:
    """exp(-d² / 2σ²), float64 (N, N), of squared distances (N, N); σ is the mean distance to the `neighbours`-th nearest."""
    k = min(neighbours, len(squared)) - 1
    sigma = float(np.sqrt(np.maximum(np.partition(squared, k, axis=1)[:, k], 0.0)).mean())
    out: F64 = np.exp(-squared / (2.0 * max(sigma, 1e-6) ** 2))
    return out


def squared_distances(logits: F32) -> F64:
    """Between the rows of float32 (N, C) without their means, at length 1 (0 where all are equal); float64 (N, N)."""
    centred = logits - logits.mean(1, keepdims=True, dtype=np.float64)
    lengths = np.sqrt(np.einsum("ij,ij->i", centred, centred))
    units = centred / np.maximum(lengths, 1e-12)[:, None]
    own = (lengths > 1e-12).astype(np.float64)
    out: F64 = np.maximum(own[:, None] + own[None, :] - 2.0 * (units @ units.T), 0.0)
    np.fill_diagonal(out, 0.0)
    return out


def laplacian_answers(probabilities: F64, affinity: F64, iterations: int = 100, tolerance: float = 1e-8) -> F64:
    """The fixed point of the module's formula from p, float64 (N, C); rows sum to 1.

    Args:
        probabilities: float64 (N, C).
        affinity: float64 (N, N), w_ij ≥ 0.
    """
    known = np.log(probabilities + 1e-10)
    answers, energy = softmax_rows(known), np.inf
    for step in range(iterations):
        drawn = affinity @ answers
        answers = softmax_rows(known + drawn)
        before, energy = energy, float(np.sum(answers * (np.log(np.maximum(answers, 1e-20)) - known - drawn)))
        if step > 1 and abs(energy - before) <= tolerance * abs(before):
            break
    return answers


class Lame:
    """LAME over a sliding window of one stream."""

    name = "lame"
    calibrated = True

    def __init__(self, class_count: int, settings: LameSettings | None = None) -> None:
        self.settings = settings or LameSettings()
        self._logits = np.zeros((self.settings.window, class_count), np.float32)
        self._probabilities = np.zeros((self.settings.window, class_count), np.float32)
        self._seen = 0

    @property
    def memory_bytes(self) -> int:
        return self._logits.nbytes + self._probabilities.nbytes

    def observe(self, logits: F32, probabilities: F32) -> None:
        at = self._seen % self.settings.window
        self._seen += 1
        self._logits[at], self._probabilities[at] = logits, probabilities

    def corrected(self) -> F32:
        s = self.settings
        n = min(self._seen, s.window)
        affinity = rbf_affinity(squared_distances(self._logits[:n]), s.neighbours)
        answers = laplacian_answers(self._probabilities[:n].astype(np.float64), affinity, s.iterations, s.tolerance)
        newest: F32 = answers[(self._seen - 1) % s.window].astype(np.float32)
        return newest

    def forget(self) -> None:
        self._seen = 0
