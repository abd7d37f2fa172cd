"""Where each norm site's channels sit in a row of all channels."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from refold.norms import NormKind, NormSite, NormState, NormTable

__all__ = ["Layout"]

F64 = NDArray[np.float64]
CONSTANT = 0.1  # of a norm's epsilon: a smaller variance is none


class Layout:
    """Sites with statistics, in execution order.

    Attributes:
        sites: the sites.
        slices: each site's channels in the row.
        channels: of all sites.
    """

    def __init__(self, table: NormTable) -> None:
        self.table = table
        self.sites: tuple[NormSite, ...] = tuple(s for s in table.norms if s.kind.has_statistics)
        edges = np.cumsum([0, *(s.channels for s in self.sites)])
        self.slices = tuple(slice(int(a), int(b)) for a, b in itertools.pairwise(edges))
        self.channels = int(edges[-1])

    def row(self, role: str, states: Mapping[str, NormState]) -> F64:
        """One of gamma, beta, mean, variance of every site, float64 (channels,); sites left out are as exported."""
        parts = [getattr(states.get(s.name, s.exported), role).astype(np.float64) for s in self.sites]
        return np.concatenate(parts) if parts else np.zeros(0)

    def live(self) -> NDArray[np.bool_]:
        """Channels whose statistics can be observed, bool (channels,): not those that were dead at export, or constant."""
        parts = []
        for site in self.sites:
            variance, epsilon = site.exported.variance.astype(np.float64), float(np.float32(site.epsilon))
            a = np.abs(site.exported.gamma.astype(np.float64)) / np.sqrt(variance + epsilon)
            alive = (a > 0) & (variance > CONSTANT * epsilon)
            if site.kind is NormKind.FOLDED:
                alive &= site.weight_scale.astype(np.float64) * a >= site.scale_floor
            parts.append(alive)
        return np.concatenate(parts) if parts else np.zeros(0, np.bool_)
