"""Moments of every norm's input for images of each group of classes: one image a run of the statistics graph, at strength 0.

Which group an image is of is what the engine itself answers, softly: no labels, and the same numbers a device sums up.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from refold.softmax import softmax_rows
from refold.statistics import INPUTS, OUTPUTS, ClassMoments, Layout
from refold.statistics.inputs import unshifted_inputs

__all__ = ["measured_moments"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
PRIOR = 2.0  # images: what a group's moments count less than the moments of all


def measured_moments(
    session: ort.InferenceSession, layout: Layout, groups: F64, x: F32, progress: Callable[[int], None] = lambda done: None
) -> ClassMoments:
    """Measures on calibration images.

    Args:
        session: of the statistics graph.
        groups: float64 (classes, K).
        x: float32 (N, 3, H, W).
        progress: called with 1 after each image.
    """
    given = unshifted_inputs(layout, groups.shape[1])
    image = next(i.name for i in session.get_inputs() if i.name not in INPUTS)
    k, n = groups.shape[1], len(x)
    weight, sums = np.zeros(k), np.zeros((2, k, layout.channels))
    squares = np.zeros((k, layout.channels))
    for i in range(n):
        moments, logits = session.run([OUTPUTS.moments, OUTPUTS.logits], {image: x[i : i + 1], **given})
        share = softmax_rows(logits[0]) @ groups
        weight += share
        mean, square = moments[0].astype(np.float64), moments[1].astype(np.float64)
        sums[0] += share[:, None] * mean
        sums[1] += share[:, None] * square
        squares += share[:, None] * mean**2
        progress(1)
    overall = sums.sum(1) / n
    means = (sums + PRIOR * overall[:, None]) / (weight + PRIOR)[None, :, None]
    spread = squares / np.maximum(weight, 1e-9)[:, None] - (sums[0] / np.maximum(weight, 1e-9)[:, None]) ** 2
    between = (weight[:, None] * np.maximum(spread, 0.0)).sum(0) / n
    variance = np.maximum(means[1] - means[0] ** 2, 1e-12)
    return ClassMoments(groups, means[0], variance, between, n)
