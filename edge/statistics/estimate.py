"""Statistics of kept images on a device, with those of earlier images beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge.serving import ServingState
from refold.statistics import Expectation, StatisticsModel
from refold.statistics.model import CONCENTRATIONS
from refold.statistics.rounds import in_rounds

__all__ = ["Estimate", "Known", "Measure", "estimate"]

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
AGAIN = CONCENTRATIONS[2:]  # where earlier images have told most of the shift, the answers are good from the first round on


class Measure(Protocol):
    """One pass over images behind statistics made in the same pass."""

    def __call__(
        self, images: Sequence[U8], base: ServingState, expected: Expectation, strength: F64, known: F64 | None,
        share: float,
    ) -> tuple[F64, F32]:  # fmt: skip
        """(moments float64 (2, channels) of the images and what was known, logits float32 (N, classes)).

        Args:
            images: uint8 (H, W, 3) each.
            base: states and activation scales. The others: as `refold.statistics.inputs.graph_inputs`.
        """


@dataclass(frozen=True, eq=False)
class Estimate:
    """What a set of images shows.

    Attributes:
        moments: float64 (2, channels), mean and mean square of every norm's input, each behind the statistics before it.
        frames: images they count for.
        mix: float64 (K,), of class groups, under which the statistics behind the logits were made.
        alone: float64 (2, channels), moments of these images without the earlier ones.
        logits: float32 (N, classes), of the images behind the final statistics.
    """

    moments: F64
    frames: float
    mix: F64
    alone: F64
    logits: F32


class Known(Protocol):
    """What earlier images showed."""

    @property
    def moments(self) -> F64: ...

    @property
    def frames(self) -> float: ...

    @property
    def mix(self) -> F64: ...


def estimate(
    measure: Measure, model: StatisticsModel, base: ServingState, images: Sequence[U8], *,
    effective: float | None = None, known: Known | None = None,
) -> Estimate:  # fmt: skip
    """Statistics of kept images, with those of earlier ones beside them.

    Args:
        base: what the statistics will be a change to: states and activation scales, without local statistics.
        images: uint8 (H, W, 3) each; at least one.
        effective: independent images that these are worth; fewer than there are when neighbours resemble each other.
        known: what earlier images of the same domain showed.
    """
    fresh = float(len(images)) if effective is None else effective
    before = known.frames if known is not None else 0.0
    frames, share = fresh + before, before / (fresh + before)
    moments_before, mix_before = (None, None) if known is None else (known.moments, known.mix)

    def one(expected: Expectation) -> tuple[F64, F32]:
        return measure(images, base, expected, model.strength, moments_before, share)

    trusts = CONCENTRATIONS if known is None else AGAIN
    moments, logits, mix, _ = in_rounds(model, frames, one, earlier=mix_before, share=share, concentrations=trusts)
    alone = moments if known is None else (moments - share * known.moments) / (1 - share)
    return Estimate(moments, frames, mix, alone, np.asarray(logits, np.float32))
