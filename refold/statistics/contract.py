"""What the statistics graph takes and gives: names, the order of rows, and the bounds both sides agree on.

The graph is written at export (`export.statistics.graph`) and run on the device (`edge.statistics`). Channels are those of all
norm sites with statistics in execution order (`refold.statistics.layout`); K is the number of class groups.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["INPUTS", "LEVELS", "OUTPUTS", "RATIO", "ROWS", "Inputs", "Outputs"]


class Inputs(NamedTuple):
    """Inputs besides the images, which keep the model's own name.

    Attributes:
        channels: float32 (len(ROWS), channels).
        directions: float32 (K, channels): per site, orthonormal directions in which the class mix moves the means.
        uncertainty: float32 (sites, K): variance along each direction.
        variance_directions, variance_uncertainty: the same of the logarithms of the variances.
        levels: float32 (sites, len(LEVELS)).
        share: float32 scalar, 0..1: what the known moments count against those of the batch.
    """

    channels: str = "statistics.channels"
    directions: str = "statistics.directions"
    uncertainty: str = "statistics.uncertainty"
    variance_directions: str = "statistics.variance_directions"
    variance_uncertainty: str = "statistics.variance_uncertainty"
    levels: str = "statistics.levels"
    share: str = "statistics.share"


class Outputs(NamedTuple):
    """Outputs.

    Attributes:
        moments: float32 (4, channels), rows in the order of `rows`.
        logits: float32 (batch, classes), behind the served statistics.
        rows: the batch's own mean and mean square of every norm's input; mean and variance as served.
    """

    moments: str = "statistics.moments"
    logits: str = "statistics.logits"
    rows: tuple[str, ...] = ("mean", "square", "served_mean", "served_variance")


ROWS = (
    "gamma",
    "beta",
    "mean",  # of the base: the exported state, or a release
    "variance",
    "expected_mean",  # at the class mix
    "expected_variance",
    "unit",  # 1 / standard deviation, 0 for a channel that is left as it is
    "deviation",  # standard deviation, 0 likewise
    "known_mean",  # of images measured before
    "known_square",
    "lowest",  # variances the trust region admits
    "highest",
)
LEVELS = (
    "noise",
    "explained",
    "variance_noise",
    "variance_explained",
    "strength",
)  # of a site; see `refold.statistics.expectation`
INPUTS, OUTPUTS = Inputs(), Outputs()
RATIO = (0.02, 50.0)  # bounds of observed to expected variance
