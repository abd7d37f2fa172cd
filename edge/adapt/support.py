"""Whether a device's own images speak for serving statistics made of them: without labels and forward only.

Two pieces of evidence, because each alone is led astray. Under strong noise a model answers one class and is sure of it, for
an image and its mirror image alike, so agreement of the two speaks against the right statistics; but the first norms, which
classes hardly move, show that the images are different. Where those show little, the model as exported still works, and the
better the statistics, the more its answers for an image and its mirror image agree (invariance and accuracy go together: Deng,
Gould and Zheng, NeurIPS 2022).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge.serving import ServingState
from edge.statistics import Measure
from refold.softmax import softmax_rows
from refold.statistics import StatisticsModel

__all__ = ["agreement", "agreement_gain", "supported"]

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
PLAIN = 0.75  # share of what the first norms see that is a shift, from which no agreement is asked for
LEAST = 0.35  # the same, below which nothing is served
GAIN = 0.005  # least gain of agreement in between


def agreement(images: F32, mirrored: F32) -> float:
    """0..1: mean probability that two draws, from the answers for an image and for its mirror image, are the same class.

    Args:
        images, mirrored: logits, float32 (N, classes).
    """
    return float((softmax_rows(images) * softmax_rows(mirrored)).sum(1).mean())


def agreement_gain(
    measure: Measure, model: StatisticsModel, without: ServingState, behind: ServingState, images: Sequence[U8]
) -> float:
    """Agreement of mirrored views behind one state minus that behind another, -1..1.

    Args:
        measure: runs the bundle behind a state, as the engine of that state does.
        images: uint8 (H, W, 3) each.
    """
    expected = model.expected(model.class_moments.flat, float(len(images)))
    nothing = np.zeros_like(model.strength)  # follows nothing of what is measured: a state is run as it is
    mirrored = [np.ascontiguousarray(image[:, ::-1]) for image in images]

    def found(state: ServingState) -> float:
        views = [measure(views, state, expected, nothing, None, 0.0)[1] for views in (images, mirrored)]
        return agreement(*views)

    return found(behind) - found(without)


def supported(shift: float, gain: float) -> bool:
    """Whether statistics are to be served.

    Args:
        shift: 0..1, of what the first norms see (`StatisticsModel.early`).
        gain: agreement behind the statistics minus agreement without them.
    """
    return shift >= PLAIN or (shift >= LEAST and gain >= GAIN)
