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
POOLED = 16.0  # images: what a group's own scatter counts less than that within all groups
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
    weight, sums = np.zeros(k), np.zeros((5, k, layout.channels))
    for i in range(n):
        moments, logits = session.run([OUTPUTS.moments, OUTPUTS.logits], {image: x[i : i + 1], **given})
        share = softmax_rows(logits[0]) @ groups
        weight += share
        mean, square = moments[0].astype(np.float64), moments[1].astype(np.float64)
        for held, value in zip(sums, (mean, square, mean**2, square**2, mean * square), strict=True):
            held += share[:, None] * value
        progress(1)
    overall = sums[:2].sum(1) / n
    means = (sums[:2] + PRIOR * overall[:, None]) / (weight + PRIOR)[None, :, None]
    between, spread = _scatter(sums / np.maximum(weight, 1e-9)[:, None])
    pooled = [(weight[:, None] * one).sum(0) / n for one in (between, spread)]
    trust = (weight / (weight + POOLED))[:, None]
    between, spread = (trust * one + (1 - trust) * all_ for one, all_ in zip((between, spread), pooled, strict=True))
    variance = np.maximum(means[1] - means[0] ** 2, 1e-12)
    return ClassMoments(groups, means[0], variance, between, spread, weight + PRIOR)


def _scatter(averages: F64) -> tuple[F64, F64]:
    """(variance between the means of images, variance of their mean square distance from the group's mean in units of its
    square): what a single image says about a group's mean and about the logarithm of its variance. (K, channels) each.

    Args:
        averages: over each group, of an image's mean, mean square, their squares and their product, (5, K, channels).
    """
    mean, square, mean2, square2, product = averages
    between = np.maximum(mean2 - mean**2, 0.0)
    distance = square2 - square**2 + 4 * mean**2 * between - 4 * mean * (product - mean * square)
    variance = np.maximum(square - mean**2, 1e-12)
    return between, np.maximum(distance, 0.0) / variance**2
