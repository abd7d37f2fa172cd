"""What every site shows at a class mix when nothing has shifted, and how far off that may be.

The mix is known as from `concentration` images (a Dirichlet distribution), the mean of `images` images is itself a sample, and
each group's moments were measured on so many calibration images. So
an observed mean lies around the expected one with the covariance, in units of each channel's exported deviation,

    B^T B + noise I,      B = L^T (mu_k - m) / deviation,      L L^T = (diag(mix) - mix mix^T) / (concentration + 1)

of which B^T B has at most K - 1 directions. They are handed on as an orthonormal basis and the variance along each. The
logarithms of observed to expected variance likewise: another mix moves them towards log(v_k / v) of single groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refold.statistics.class_moments import ClassMoments
from refold.statistics.layout import Layout

__all__ = ["Expectation", "Unexplained", "expectation"]

F64 = NDArray[np.float64]
CONSTANT = 1e-6  # of the exported variance: a channel that varied less on every calibration image is not followed


@dataclass(frozen=True, eq=False)
class Unexplained:
    """How far a site's channels may be from what is expected without a shift.

    Attributes:
        directions: float64 (K, channels), orthonormal within each site.
        uncertainty: float64 (sites, K), variance along each direction.
        noise: float64 (sites,), sampling variance of one channel, on average over the site.
        explained: float64 (sites,), mean square over the site's channels that mix and sampling explain.
    """

    directions: F64
    uncertainty: F64
    noise: F64
    explained: F64

    @classmethod
    def of(cls, layout: Layout, spread: F64, noise: F64) -> Unexplained:
        """Of deviations (K, channels) whose outer products add up to the covariance, and the sampling variance (channels,)."""
        k, sites = spread.shape[0], len(layout.sites)
        directions, uncertainty = np.zeros((k, layout.channels)), np.zeros((sites, k))
        each, explained = np.zeros(sites), np.zeros(sites)
        for i, cut in enumerate(layout.slices):
            _, size, basis = np.linalg.svd(spread[:, cut], full_matrices=False)
            directions[: len(size), cut] = basis
            uncertainty[i, : len(size)] = size**2
            each[i] = max(float(noise[cut].mean()), 1e-9)
            explained[i] = each[i] + float((size**2).sum()) / (cut.stop - cut.start)
        return cls(directions, uncertainty, each, explained)

    @classmethod
    def nothing(cls, layout: Layout, groups: int, noise: float = 1.0) -> Unexplained:
        """No mix, and the same noise everywhere."""
        sites = len(layout.sites)
        each = np.full(sites, noise)
        return cls(np.zeros((groups, layout.channels)), np.zeros((sites, groups)), each, each)

    def excess(self, site: int, d: F64) -> float:
        """What d, (channels of the site,), has beyond the explained: the variance of a shift."""
        return max(float((d**2).mean()) - float(self.explained[site]), 0.0)

    def shift(self, site: int, cut: slice, d: F64) -> tuple[F64, float]:
        """Posterior mean of a site's shift, (channels of the site,), and the share of d that is one, 0..1."""
        noise, explained, excess = float(self.noise[site]), float(self.explained[site]), self.excess(site, d)
        loose = excess + noise
        v, t = self.directions[:, cut], self.uncertainty[site]
        return excess / loose * (d - v.T @ (t / (t + loose) * (v @ d))), excess / (excess + explained)


@dataclass(frozen=True, eq=False)
class Expectation:
    """Attributes:
    mean, variance: float64 (channels,), expected at the mix.
    deviation: float64 (channels,), of the exported statistics; 0 for channels that cannot be observed.
    means: of observed minus expected means, in exported deviations.
    variances: of the logarithms of observed to expected variances.
    """

    mean: F64
    variance: F64
    deviation: F64
    means: Unexplained
    variances: Unexplained


def expectation(moments: ClassMoments, layout: Layout, mix: F64, concentration: float, images: float) -> Expectation:
    """The expectation at a mix.

    Args:
        mix: float64 (K,).
        concentration: images that the mix is known from.
        images: images behind the moments that will be observed.
    """
    mean, variance = moments.moments(mix)
    exported = layout.row("variance", {})
    live = layout.live() & (moments.variance.max(0) > CONSTANT * exported)
    deviation = np.where(live, np.sqrt(np.maximum(exported, 1e-12)), 0.0)
    unit = np.where(live, 1 / np.where(live, deviation, 1.0), 0.0)
    covariance = (np.diag(mix) - np.outer(mix, mix)) / (concentration + 1)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    apart = np.log(moments.variance / variance) * live
    of_means, of_variances = moments.chance(mix, images)
    return Expectation(
        mean,
        variance,
        deviation,
        Unexplained.of(layout, root.T @ ((moments.mean - mean) * unit), of_means * unit**2),
        Unexplained.of(layout, np.sqrt(mix / (concentration + 1))[:, None] * apart, of_variances * live),
    )
