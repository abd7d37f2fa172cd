"""Observed moments and an expectation in, statistics to serve out: what the statistics graph computes at every site, in numpy.

With d the observed minus the expected mean in units of the exported deviation, the shift s of a site is taken to be
N(0, lambda I), and d = s + e with e ~ N(0, B^T B + noise I) (`expectation`). lambda is what d has beyond the explained (a
moment estimate: empirical Bayes, Morris 1983), and the shift its posterior mean

    s = lambda (lambda I + noise I + B^T B)^-1 d
      = lambda / (lambda + noise) (d - V^T diag(t / (t + lambda + noise)) V d)

with V the directions and t the variance along each. Where the mix explains d, lambda is 0 and nothing moves; what lies outside
the few directions of the mix is kept almost whole. The logarithms of observed to expected variance are treated alike, with
directions and a lambda of their own: noise moves the first norm's variances and not its means.
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
from refold.statistics.trust import within_trust

__all__ = ["Posterior", "differences", "posterior", "served_states", "site_posterior"]

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
    sites = [
        site_posterior(expected, i, cut, mean[cut], variance[cut], base_mean[cut], base_variance[cut], float(strength[i]))
        for i, cut in enumerate(layout.slices)
    ]
    if not sites:
        return Posterior(base_mean, base_variance, np.zeros(0))
    means, variances, shares = zip(*sites, strict=True)
    return Posterior(np.concatenate(means), np.concatenate(variances), np.array(shares))


def site_posterior(
    expected: Expectation, site: int, cut: slice, mean: F64, variance: F64, base_mean: F64, base_variance: F64, strength: float
) -> tuple[F64, F64, float]:
    """Mean, variance (channels of the site,) and share of one site; see `posterior`.

    Args:
        site: its number.
        cut: its channels in the row of all.
        mean, variance, base_mean, base_variance: of this site's channels.
    """
    deviation = expected.deviation[cut]
    d, apart = differences(expected, cut, mean, variance)
    shift, share = expected.means.shift(site, cut, d)
    spread, other = expected.variances.shift(site, cut, apart)
    moved = shift * deviation
    served = base_variance * np.exp(strength * spread) + strength * (1 - strength) * moved**2
    return base_mean + strength * moved, np.where(deviation > 0, served, base_variance), max(share, other)


def differences(expected: Expectation, cut: slice, mean: F64, variance: F64) -> tuple[F64, F64]:
    """Observed minus expected means in exported deviations, and logarithms of observed to expected variances, of one site;
    0 for channels that cannot be observed. Arguments as of `site_posterior`.
    """
    deviation = expected.deviation[cut]
    live = deviation > 0
    apart = np.where(live, (mean - expected.mean[cut]) / np.where(live, deviation, 1.0), 0.0)
    return apart, np.log(np.clip(variance / expected.variance[cut], *RATIO)) * live


def served_states(layout: Layout, base: Mapping[str, NormState], found: Posterior) -> dict[str, NormState]:
    """`base` (sites left out: as exported) with the statistics found, inside the trust region. Sites without statistics are
    passed on."""
    states = dict(base)
    for site, cut in zip(layout.sites, layout.slices, strict=True):
        state = base.get(site.name, site.exported)
        own = state.with_statistics(
            np.ascontiguousarray(found.mean[cut], np.float32), np.ascontiguousarray(found.variance[cut], np.float32)
        )
        states[site.name] = within_trust(site, own, layout.table.trust_ratio)
    return states
