"""Groups of classes that answer alike, so that a mix of a thousand classes is one of sixteen numbers.

Up to `MOST` classes each class is a group of its own. Beyond, k-means (Lloyd 1982, k-means++ start, fixed seed) on the classes'
logits over the calibration images, each centred and scaled to unit length: classes that rise on the same images are alike.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST", "class_groups"]

F64 = NDArray[np.float64]
MOST = 16
ROUNDS = 50


def class_groups(logits: NDArray[np.floating], most: int = MOST) -> F64:
    """float64 (classes, K), one 1 a row.

    Args:
        logits: (N, classes), of the calibration images.
    """
    classes = logits.shape[1]
    if classes <= most:
        return np.eye(classes)
    profile = (logits - logits.mean(1, keepdims=True)).T.astype(np.float64)
    profile -= profile.mean(1, keepdims=True)
    profile /= np.maximum(np.linalg.norm(profile, axis=1, keepdims=True), 1e-12)
    label = _nearest(profile, _start(profile, most))
    for _ in range(ROUNDS):
        centres = np.stack([profile[label == k].mean(0) for k in range(int(label.max()) + 1)])
        again = _relabelled(_nearest(profile, centres))
        if np.array_equal(again, label):
            break
        label = again
    return np.eye(int(label.max()) + 1)[label]


def _start(profile: F64, count: int) -> F64:
    """k-means++ (Arthur and Vassilvitskii 2007): each centre far from those before it."""
    rng = np.random.default_rng(0)
    chosen = [int(rng.integers(len(profile)))]
    for _ in range(count - 1):
        distance = _distances(profile, profile[chosen]).min(1)
        total = distance.sum()
        if total <= 0:
            break
        chosen.append(int(rng.choice(len(profile), p=distance / total)))
    return profile[chosen]


def _distances(a: F64, b: F64) -> F64:
    found: F64 = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0.0)
    return found


def _nearest(profile: F64, centres: F64) -> NDArray[np.int64]:
    return _relabelled(_distances(profile, centres).argmin(1))


def _relabelled(label: NDArray[np.integer]) -> NDArray[np.int64]:
    """Labels 0 to K - 1 without gaps, in order of first use."""
    seen: dict[int, int] = {}
    return np.array([seen.setdefault(int(k), len(seen)) for k in label], np.int64)
