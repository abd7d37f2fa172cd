"""Variances that the trust region admits, and states moved into it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refold.norms import NormKind, NormSite, NormState

__all__ = ["variance_bounds", "within_trust"]

F64 = NDArray[np.float64]
MARGIN = 0.98  # stay inside the trust region by more than float32 rounds


def variance_bounds(site: NormSite, gamma: NDArray[np.float32], trust_ratio: float) -> tuple[F64, F64]:
    """(lowest, highest) variances, float64 (channels,), that `refold.norms.check_state` admits beside this gamma.

    Channels without a scale to compare with (gamma 0 at export) have no bounds; channels dead at export keep their variance.
    """
    epsilon = float(np.float32(site.epsilon))
    size = np.abs(gamma.astype(np.float64))
    exported = np.abs(site.exported.gamma.astype(np.float64)) / np.sqrt(site.exported.variance.astype(np.float64) + epsilon)
    live, reach = exported > 0, trust_ratio * MARGIN
    safe = np.where(live, exported, 1.0)
    lowest = np.where(live, np.maximum((size / (safe * reach)) ** 2 - epsilon, 0.0), 0.0)
    highest = np.where(live, np.maximum((size * reach / safe) ** 2 - epsilon, 0.0), np.inf)
    if site.kind is NormKind.FOLDED:
        dead = site.weight_scale.astype(np.float64) * exported < site.scale_floor
        variance = site.exported.variance.astype(np.float64)
        lowest, highest = np.where(dead, variance, lowest), np.where(dead, variance, highest)
    return lowest, highest


def within_trust(site: NormSite, state: NormState, trust_ratio: float) -> NormState:
    """The state with its variances moved, where needed, to the nearest ones that are admitted."""
    lowest, highest = variance_bounds(site, state.gamma, trust_ratio)
    variance = np.clip(state.variance.astype(np.float64), lowest, highest)
    return state.with_statistics(state.mean, np.ascontiguousarray(variance, np.float32))
