"""The statistics graph's inputs besides the images, by name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from refold.norms import NormState
from refold.statistics.contract import INPUTS, ROWS
from refold.statistics.expectation import Expectation, Unexplained
from refold.statistics.layout import Layout
from refold.statistics.trust import variance_bounds

__all__ = ["graph_inputs", "unshifted_inputs"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
HIGHEST = 3e38  # float32


def graph_inputs(
    layout: Layout,
    base: Mapping[str, NormState],
    expected: Expectation,
    strength: F64,
    known: F64 | None = None,
    share: float = 0.0,
) -> dict[str, F32]:
    """Inputs of one run.

    Args:
        base: by site name; sites left out are as exported.
        strength: float64 (sites,), 0..1.
        known: moments of images measured before, float64 (2, channels): mean and mean square.
        share: what they count, 0..1, against the images of the run.
    """
    known = np.zeros((2, layout.channels)) if known is None else known
    live = expected.deviation > 0
    bounds = [variance_bounds(s, base.get(s.name, s.exported).gamma, layout.table.trust_ratio) for s in layout.sites]
    rows = {
        **{role: layout.row(role, base) for role in ("gamma", "beta", "mean", "variance")},
        "expected_mean": expected.mean,
        "expected_variance": expected.variance,
        "unit": np.where(live, 1 / np.where(live, expected.deviation, 1.0), 0.0),
        "deviation": expected.deviation,
        "known_mean": known[0],
        "known_square": known[1],
        "lowest": np.concatenate([low for low, _ in bounds]),
        "highest": np.minimum(np.concatenate([high for _, high in bounds]), HIGHEST),
    }
    channels = np.stack([rows[role] for role in ROWS])
    # A channel that is left as it is keeps its variance whatever is observed.
    channels[ROWS.index("lowest"), ~live] = channels[ROWS.index("highest"), ~live] = rows["variance"][~live]
    means, variances = expected.means, expected.variances
    levels = (means.noise, means.explained, variances.noise, variances.explained, strength)
    return {
        INPUTS.channels: channels.astype(np.float32),
        INPUTS.directions: means.directions.astype(np.float32),
        INPUTS.uncertainty: means.uncertainty.astype(np.float32),
        INPUTS.variance_directions: variances.directions.astype(np.float32),
        INPUTS.variance_uncertainty: variances.uncertainty.astype(np.float32),
        INPUTS.levels: np.stack(levels, 1).astype(np.float32),
        INPUTS.share: np.asarray(share, np.float32),
    }


def unshifted_inputs(layout: Layout, groups: int, base: Mapping[str, NormState] | None = None) -> dict[str, F32]:
    """Inputs with which the graph is the engine at `base`: it measures and changes nothing."""
    base = base or {}
    expected = Expectation(
        layout.row("mean", base),
        np.maximum(layout.row("variance", base), 1e-12),
        np.zeros(layout.channels),
        Unexplained.nothing(layout, groups),
        Unexplained.nothing(layout, groups),
    )
    return graph_inputs(layout, base, expected, np.zeros(len(layout.sites)))
