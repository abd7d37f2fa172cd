"""A few rounds over the same images: class mix, what is expected at it, what is observed, answers behind that, class mix again.

The first round takes every class for equally likely and hardly trusts that: only what no mix of classes explains is corrected.
The answers behind that correction are better than the exported model's, so the next round knows the mix better, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from refold.softmax import softmax_rows
from refold.statistics.expectation import Expectation
from refold.statistics.model import CONCENTRATIONS, StatisticsModel

__all__ = ["in_rounds"]

F64 = NDArray[np.float64]
Found = TypeVar("Found")


def in_rounds(
    model: StatisticsModel,
    frames: float,
    one: Callable[[Expectation], tuple[Found, NDArray[np.floating]]],
    *,
    seen: F64 | None = None,
    earlier: F64 | None = None,
    share: float = 0.0,
    concentrations: Sequence[float] = CONCENTRATIONS,
) -> tuple[Found, NDArray[np.floating], F64, F64]:
    """(what the last round found, its logits, the mix it was made under, the mix that its answers speak of).

    Args:
        frames: independent images behind what is observed, earlier ones included.
        one: one round: what is observed at an expectation, and the logits (N, classes) behind it.
        seen: mix of these images to begin with, float64 (K,); flat where nothing is known.
        earlier: mix of earlier images that are counted in.
        share: what those count, 0..1.
        concentrations: images that the mix counts for, round after round; at least one.
    """
    classes = model.class_moments
    seen = classes.flat if seen is None else seen
    earlier = classes.flat if earlier is None else earlier
    for concentration in concentrations:
        mix = (1 - share) * seen + share * earlier
        found, logits = one(model.expected(mix, frames, concentration))
        seen = classes.mix(softmax_rows(logits))
    return found, logits, mix, seen
