"""Label shift: the teachers' predictions corrected for a domain whose class mix is another than the one they learnt.

Saerens, Latinne and Decaestecker, "Adjusting the Outputs of a Classifier to New a Priori Probabilities" (Neural Computation 14,
2002): expectation maximisation of the class mix π, from the mix π0 of the calibration slice (even where unknown),

    p'_i[c] ∝ p_i[c] · π[c] ÷ π0[c],   π[c] ← mean_i p'_i[c],   until π stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cloud.training.step import TargetModifier, TeacherPool

__all__ = ["LabelShift", "LabelShiftSettings", "corrected"]

F32 = NDArray[np.float32]
STAYS = 1e-6  # largest change of a class's share


@dataclass(frozen=True)
class LabelShiftSettings:
    """shift_rounds: expectation maximisation ends after so many."""

    shift_rounds: int = 100


def corrected(probabilities: F32, prior: NDArray[np.float64], rounds: int) -> tuple[F32, NDArray[np.float64]]:
    """Corrected probabilities (n, classes) and the estimated class mix (classes,), from the mix `prior` (classes,)."""
    p = probabilities.astype(np.float64)
    mix, moved = prior, p
    for _ in range(rounds):
        moved = p * (mix / prior)
        moved /= moved.sum(1, keepdims=True)
        after = moved.mean(0)
        change, mix = float(np.abs(after - mix).max()), after
        if change < STAYS:
            break
    return moved.astype(np.float32), mix


class LabelShift(TargetModifier[LabelShiftSettings]):
    """See the module."""

    source: ClassVar[str] = "Saerens et al., Neural Computation 14 (2002) 21-41"
    formula: ClassVar[str] = "t'[c] ∝ t[c] π[c]/π0[c], π by expectation maximisation"
    settings_type: ClassVar[type] = LabelShiftSettings

    def combined(self, votes: F32, combined: F32, pool: TeacherPool) -> F32:
        classes = combined.shape[1]
        counts = np.bincount(pool.labels[pool.labels >= 0], minlength=classes)[:classes] + 1.0
        return corrected(combined, counts / counts.sum(), self.settings.shift_rounds)[0]
