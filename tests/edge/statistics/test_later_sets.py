"""A later set of images is joined to the earlier ones with a class mix of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge.serving import ServingState
from edge.statistics import StatisticsGraph, estimate
from refold.softmax import softmax_rows
from refold.statistics import StatisticsModel


@dataclass
class Before:
    moments: np.ndarray
    frames: float
    mix: np.ndarray


def test_the_joined_mix_is_of_earlier_and_later_images(exported, foggy):
    model = StatisticsModel.of(exported)
    measure = StatisticsGraph(exported, model.layout, memory=2**26)
    first = estimate(measure, model, ServingState(), foggy[: len(foggy) // 2])
    later = foggy[len(foggy) // 2 :]
    other = np.eye(model.class_moments.count)[0]  # as if the earlier ones had been of one class
    joined = estimate(measure, model, ServingState(), later, known=Before(first.moments, 192.0, other))
    share = 192.0 / (192.0 + len(later))
    seen = (joined.mix - share * other) / (1 - share)
    np.testing.assert_allclose(seen.sum(), 1)
    np.testing.assert_allclose(seen, model.class_moments.mix(softmax_rows(joined.logits)), atol=0.1)
    assert joined.mix[0] < 1 - 0.5 * (1 - share)  # it moved
