"""A small norm table, class moments and observations, from one seed."""

from __future__ import annotations

import numpy as np

from refold import NormSite, NormState, NormTable
from refold.statistics import ClassMoments, Layout

CLASSES = 4


def table(seed: int = 0, channels: tuple[int, ...] = (6, 9)) -> NormTable:
    rng = np.random.default_rng(seed)
    sites = []
    for i, n in enumerate(channels):
        state = NormState(rng.uniform(0.5, 2, n), rng.normal(0, 1, n), rng.normal(0, 1, n), rng.uniform(0.2, 3, n))
        sites.append(
            NormSite.folded(
                f"conv{i}", weight_scale=np.full(n, 0.01), layer_bias=np.zeros(n), exported=state, input_tensor="x",
                input_scale=0.03,
            )
        )  # fmt: skip
    return NormTable(tuple(sites))


def class_moments(layout: Layout, seed: int = 1, apart: float = 0.5) -> ClassMoments:
    """Classes whose means lie `apart` deviations around the exported ones, which they average to."""
    rng = np.random.default_rng(seed)
    mean, variance = layout.row("mean", {}), layout.row("variance", {})
    offset = rng.normal(0, apart, (CLASSES, layout.channels))
    offset -= offset.mean(0)
    within = np.maximum(variance * rng.uniform(0.5, 1, (CLASSES, layout.channels)), 1e-3)
    between = np.tile(0.1 * variance, (CLASSES, 1))
    return ClassMoments(
        np.eye(CLASSES), mean + offset * np.sqrt(variance), within, between, np.full_like(between, 0.5), np.full(CLASSES, 64.0)
    )
