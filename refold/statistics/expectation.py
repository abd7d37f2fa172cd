"""What every site shows at a class mix when nothing has shifted, and how far off that may be.

The mix is known as from `concentration` images (a Dirichlet distribution), the mean of `images` images is itself a sample. So
an observed mean lies around the expected one with the covariance, in units of each channel's exported deviation,

    B^T B + noise I,      B = L^T (mu_k - m) / deviation,      L L^T = (diag(mix) - mix mix^T) / (concentration + 1)

of which B^T B has at most K - 1 directions. They are handed on as an orthonormal basis and the variance along each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refold.statistics.class_moments import ClassMoments
from refold.statistics.layout import Layout

__all__ = ["Expectation", "expectation"]

F64 = NDArray[np.float64]
LOG_VARIANCE = (
    0.5  # variance of the logarithm of one image's variance at a norm, about; of many images it is that by their number
)


@dataclass(frozen=True, eq=False)
class Expectation:
    """Attributes:
    mean, variance: float64 (channels,), expected at the mix.
    deviation: float64 (channels,), of the exported statistics; 0 for channels that cannot be observed.
    directions: float64 (K, channels), orthonormal within each site.
    uncertainty: float64 (sites, K), variance along each direction.
    noise: float64 (sites,), sampling variance of a channel's mean, on average over the site.
    explained: float64 (sites,), mean square over the site's channels that mix and sampling explain.
    variance_explained: float64 (sites,), the same of the logarithm of observed to expected variance.
    """

    mean: F64
    variance: F64
    deviation: F64
    directions: F64
    uncertainty: F64
    noise: F64
    explained: F64
    variance_explained: F64


def expectation(moments: ClassMoments, layout: Layout, mix: F64, concentration: float, images: float) -> Expectation:
    """The expectation at a mix.

    Args:
        mix: float64 (K,).
        concentration: images that the mix is known from.
        images: images behind the means that will be observed.
    """
    mean, variance = moments.moments(mix)
    exported = layout.row("variance", {})
    live = layout.live()
    deviation = np.where(live, np.sqrt(np.maximum(exported, 1e-12)), 0.0)
    unit = np.where(live, 1 / np.where(live, deviation, 1.0), 0.0)
    covariance = (np.diag(mix) - np.outer(mix, mix)) / (concentration + 1)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    spread = root.T @ ((moments.mean - mean) * unit)
    sampling = moments.between * unit**2 / max(images, 1.0)
    k, sites = moments.count, len(layout.sites)
    directions, uncertainty = np.zeros((k, layout.channels)), np.zeros((sites, k))
    noise, explained, variance_explained = np.zeros(sites), np.zeros(sites), np.zeros(sites)
    apart = np.log(moments.variance / variance) * (deviation > 0)
    mixed = mix @ apart**2 / (concentration + 1)
    for i, cut in enumerate(layout.slices):
        _, size, basis = np.linalg.svd(spread[:, cut], full_matrices=False)
        directions[: len(size), cut] = basis
        uncertainty[i, : len(size)] = size**2
        noise[i] = max(float(sampling[cut].mean()), 1e-9)
        explained[i] = noise[i] + float((size**2).sum()) / (cut.stop - cut.start)
        variance_explained[i] = float(mixed[cut].mean()) + LOG_VARIANCE / max(images, 1.0)
    return Expectation(mean, variance, deviation, directions, uncertainty, noise, explained, variance_explained)
