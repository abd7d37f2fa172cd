"""What to make of a class mix that answers speak of: that very mix, or the one the bundle was exported for.

Answers behind a shift are biased: on a stream with all classes alike a few seem twice as frequent, and taking that for the
mix costs two points. So a mix that is near the calibration images' is taken for theirs. Two hypotheses are compared: the true
mix is theirs, and what answers speak of scatters around it as a sample of `SCATTER` images would; or it is any other, all alike
likely.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from refold.statistics.class_moments import ClassMoments

__all__ = ["SCATTER", "believed", "chance_of_home"]

F64 = NDArray[np.float64]
SCATTER = 120.0
LEAST = 1e-4  # share of a group that no image and no calibration image speaks for


def chance_of_home(classes: ClassMoments, mix: F64) -> float:
    """0..1: that images whose answers speak of this mix, float64 (K,), have that of the calibration images."""
    home = classes.home
    if classes.count == 1:
        return 1.0
    likely = _log_density(mix, np.maximum(SCATTER * home, LEAST)) - _log_density(mix, np.ones(classes.count))
    return 1 / (1 + math.exp(-min(max(likely, -500.0), 500.0)))


def believed(classes: ClassMoments, mix: F64) -> F64:
    """The mix to expect, float64 (K,): between the one given and the calibration images'."""
    home = chance_of_home(classes, mix)
    return home * classes.home + (1 - home) * mix


def _log_density(mix: F64, counts: F64) -> float:
    """Of a Dirichlet distribution."""
    scale = math.lgamma(float(counts.sum())) - sum(math.lgamma(float(c)) for c in counts)
    return scale + float(((counts - 1) * np.log(np.maximum(mix, LEAST))).sum())
