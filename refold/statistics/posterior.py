"""Observed moments and an expectation in, statistics to serve out: what the statistics graph computes at every site, in numpy.

With d the observed minus the expected mean in units of the exported deviation, the shift s of a site is taken to be
N(0, lambda I), and d = s + e with e ~ N(0, B^T B + noise I) (`expectation`). lambda is what d has beyond the explained (a
moment estimate: empirical Bayes, Morris 1983), and the shift its posterior mean

    s = lambda (lambda I + noise I + B^T B)^-1 d
      = lambda / (lambda + noise) (d - V^T diag(t / (t + lambda + noise)) V d)

with V the directions and t the variance along each. Where the mix explains d, lambda is 0 and nothing moves; what lies outside
the few directions of the mix is kept almost whole. Variances follow by the same share k = lambda / (lambda + explained).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refold.norms import NormState
from refold.statistics.contract import RATIO
from refold.statistics.expectation import Expectation
from refold.statistics.layout import Layout

__all__ = ["Posterior", "posterior", "served_states"]

F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Posterior:
    """Attributes:
    mean, variance: float64 (channels,), to be served.
    share: float64 (sites,), 0..1: how much of what was observed at a site is a shift.
    """

    mean: F64
    variance: F64
    share: F64


def posterior(
    layout: Layout, expected: Expectation, mean: F64, variance: F64, base_mean: F64, base_variance: F64, strength: F64
) -> Posterior:
    """Statistics to serve at every site.

    Args:
        mean, variance: observed, float64 (channels,).
        base_mean, base_variance: what they are a change to: the exported statistics or a release's.
        strength: float64 (sites,), 0..1: how far to go.
    """
    live = expected.deviation > 0
    unit = np.where(live, 1 / np.where(live, expected.deviation, 1.0), 0.0)
    d = (mean - expected.mean) * unit
    ratio = np.clip(variance / expected.variance, *RATIO)
    share, shift = np.zeros(len(layout.sites)), np.zeros(layout.channels)
    for i, cut in enumerate(layout.slices):
        excess = max(float((d[cut] ** 2).mean()) - float(expected.explained[i]), 0.0)
        loose = excess + float(expected.noise[i])
        v, t = expected.directions[:, cut], expected.uncertainty[i]
        shift[cut] = excess / loose * (d[cut] - v.T @ (t / (t + loose) * (v @ d[cut])))
        share[i] = excess / (excess + float(expected.explained[i]))
    w, k = layout.per_site(strength), layout.per_site(strength * share)
    moved = shift * expected.deviation
    served = (1 - k) * base_variance + k * base_variance * ratio + w * (1 - w) * moved**2
    return Posterior(base_mean + w * moved, np.where(live, served, base_variance), share)


def served_states(layout: Layout, base: Mapping[str, NormState], found: Posterior) -> dict[str, NormState]:
    """`base` (sites left out: as exported) with the statistics found. Sites without statistics are passed on."""
    states = dict(base)
    for site, cut in zip(layout.sites, layout.slices, strict=True):
        state = base.get(site.name, site.exported)
        states[site.name] = state.with_statistics(
            np.ascontiguousarray(found.mean[cut], np.float32), np.ascontiguousarray(found.variance[cut], np.float32)
        )
    return states
