"""Whether a device's own images speak for serving statistics made of them: without labels and forward only.

Each question alone is led astray. The first norms, which classes hardly move, tell that images are different, and not whether
the model minds. The better the statistics, the more a model's answers for an image and for its mirror image agree (invariance
and accuracy go together: Deng, Gould and Zheng, NeurIPS 2022); but under strong noise a model answers one class and is sure of
it, for both views alike, so agreement speaks against the right statistics. Then the answers behind them are more diverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.serving import ServingState
from edge.statistics import Measure
from refold.softmax import softmax_rows
from refold.statistics import StatisticsModel

__all__ = ["AGREED", "Change", "agreement", "change_of_answers", "diversity", "supported"]

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
PLAIN = 0.75  # share of what the first norms see that is a shift, from which agreement is not asked for
LEAST = 0.35  # the same, below which nothing is served
GAIN = 0.005  # least gain of agreement in between
LOSS = 0.02  # loss of agreement that speaks against a plain shift too, where answers are no more diverse
DIVERSE = 0.2  # nats


@dataclass(frozen=True)
class Change:
    """How answers for a device's images change with a state.

    Attributes:
        agreement: of mirrored views, -1..1.
        diversity: nats.
    """

    agreement: float = 0.0
    diversity: float = 0.0

    def beside(self, earlier: Change, share: float) -> Change:
        """This and an earlier one that counts for a share, 0..1."""
        return Change(
            share * earlier.agreement + (1 - share) * self.agreement, share * earlier.diversity + (1 - share) * self.diversity
        )


AGREED = Change(1.0)  # as much as can be: what no answers could help is not worth asking them


def agreement(images: F32, mirrored: F32) -> float:
    """0..1: mean probability that two draws, from the answers for an image and for its mirror image, are the same class.

    Args:
        images, mirrored: logits, float32 (N, classes).
    """
    return float((softmax_rows(images) * softmax_rows(mirrored)).sum(1).mean())


def diversity(logits: F32) -> float:
    """Entropy of the mean answer, nats.

    Args:
        logits: float32 (N, classes).
    """
    mean = softmax_rows(logits).mean(0)
    return float(-(mean * np.log(np.maximum(mean, 1e-12))).sum())


def change_of_answers(
    measure: Measure, model: StatisticsModel, without: ServingState, behind: ServingState, images: Sequence[U8]
) -> Change:
    """From one state to another.

    Args:
        measure: runs the bundle behind a state, as the engine of that state does.
        images: uint8 (H, W, 3) each.
    """
    expected = model.expected(model.class_moments.flat, float(len(images)))
    nothing = np.zeros_like(model.strength)  # follows nothing of what is measured: a state is run as it is
    mirrored = [np.ascontiguousarray(image[:, ::-1]) for image in images]

    def found(state: ServingState) -> tuple[float, float]:
        seen, other = (measure(views, state, expected, nothing, None, 0.0)[1] for views in (images, mirrored))
        return agreement(seen, other), diversity(seen)

    before, after = found(without), found(behind)
    return Change(after[0] - before[0], after[1] - before[1])


def supported(shift: float, change: Change) -> bool:
    """Whether statistics are to be served.

    Args:
        shift: 0..1, of what the first norms see (`StatisticsModel.early`).
        change: of the images' answers, from without the statistics to behind them.
    """
    if shift >= PLAIN:
        return change.agreement >= -LOSS or change.diversity >= DIVERSE
    return shift >= LEAST and change.agreement >= GAIN
