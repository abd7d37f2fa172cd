"""A release's statistics and the device's own, averaged by the images behind each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from refold.norms import NormState
from refold.statistics import Layout, within_trust

__all__ = ["blended_states"]


def blended_states(
    layout: Layout, released: Mapping[str, NormState], own: Mapping[str, NormState], weight: float
) -> dict[str, NormState]:
    """Two estimates of one domain's served statistics: a share `weight`, 0..1, of `own`. Affine parameters are `own`'s."""
    states = dict(own)
    for site in layout.sites:
        a, b = released.get(site.name, site.exported), own[site.name]
        mean = (1 - weight) * a.mean.astype(np.float64) + weight * b.mean.astype(np.float64)
        variance = (1 - weight) * a.variance.astype(np.float64) + weight * b.variance.astype(np.float64)
        both = b.with_statistics(np.asarray(mean, np.float32), np.asarray(variance, np.float32))
        states[site.name] = within_trust(site, both, layout.table.trust_ratio)
    return states
