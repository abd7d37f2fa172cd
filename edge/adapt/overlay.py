"""Overlay: reference statistics and observed ones, mixed, on a release's affine parameters.

    mean     = (1 - w) mean_r + w mean_o
    variance = (1 - w) variance_r + w variance_o + w (1 - w) (mean_r - mean_o)^2

the moments of a population of which a share w is what was observed (alpha-BN, arXiv 2110.04065, with the variance of the
mixture instead of the mixture of variances; Schneider et al. 2020 for w = n / (n + n0)).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edge.adapt.evidence import Evidence, TapLayout
from refold.norms import NormKind, NormSite, NormState

__all__ = ["blended_states", "mixed_states", "within_trust"]

F64 = NDArray[np.float64]
MARGIN = 0.98  # stay inside the trust region by more than float32 rounds


def mixed_states(
    layout: TapLayout, base: Mapping[str, NormState], evidence: Evidence, weight: float, trust_ratio: float
) -> dict[str, NormState]:
    """States of every site with statistics: `base` (sites left out: as exported) with a share `weight` of the evidence.

    The result is admissible whenever `base` is. Sites of `base` without statistics are passed on as they are.
    """
    states = dict(base)
    for site, cut in zip(layout.sites, layout.slices, strict=True):
        state = base.get(site.name, site.exported)
        mean_r, variance_r = state.mean.astype(np.float64), state.variance.astype(np.float64)
        mean_o, variance_o = evidence.mean[cut], evidence.variance[cut]
        mean = (1 - weight) * mean_r + weight * mean_o
        variance = (1 - weight) * variance_r + weight * variance_o + weight * (1 - weight) * (mean_r - mean_o) ** 2
        states[site.name] = within_trust(site, state.with_statistics(_f32(mean), _f32(variance)), trust_ratio)
    return states


def blended_states(
    layout: TapLayout, released: Mapping[str, NormState], own: Mapping[str, NormState], weight: float, trust_ratio: float
) -> dict[str, NormState]:
    """Two estimates of one domain's served statistics, averaged: a share `weight` of `own`. Affine parameters are `own`'s."""
    states = dict(own)
    for site in layout.sites:
        a, b = released.get(site.name, site.exported), own[site.name]
        mean = (1 - weight) * a.mean.astype(np.float64) + weight * b.mean.astype(np.float64)
        variance = (1 - weight) * a.variance.astype(np.float64) + weight * b.variance.astype(np.float64)
        states[site.name] = within_trust(site, b.with_statistics(_f32(mean), _f32(variance)), trust_ratio)
    return states


def within_trust(site: NormSite, state: NormState, trust_ratio: float) -> NormState:
    """The state with its variances moved, where needed, to the nearest ones that `refold.norms.check_state` admits."""
    live = np.abs(site.exported.gamma) > 0
    epsilon = float(np.float32(site.epsilon))
    gamma = np.abs(state.gamma.astype(np.float64))
    exported = np.abs(site.exported.gamma.astype(np.float64)) / np.sqrt(site.exported.variance.astype(np.float64) + epsilon)
    reach = trust_ratio * MARGIN
    safe = np.where(live, exported, 1.0)
    lowest = np.maximum((gamma / (safe * reach)) ** 2 - epsilon, 0.0)
    highest = np.maximum((gamma * reach / safe) ** 2 - epsilon, 0.0)
    variance = np.where(live, np.clip(state.variance.astype(np.float64), lowest, highest), state.variance)
    if site.kind is NormKind.FOLDED:  # a channel dead at export has nothing to observe: it keeps its exported statistics
        dead = site.weight_scale.astype(np.float64) * exported < site.scale_floor
        variance = np.where(dead, site.exported.variance, variance)
    return state.with_statistics(state.mean, _f32(variance))


def _f32(values: F64) -> NDArray[np.float32]:
    return np.ascontiguousarray(values, dtype=np.float32)
