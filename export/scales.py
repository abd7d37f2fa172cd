"""Scales and zero points of activations from what calibration saw of them, by three observers.

minmax      the whole range: no clipping, coarser steps
percentile  all but a few outliers
entropy     the clipping whose quantised histogram diverges least from the true one (as TensorRT's calibrator)
mse         the clipping with the least mean squared error: the one to take below 8 bits, where steps cost more than outliers
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["COMPETING", "LEVELS", "OBSERVERS", "Range", "Scale", "scale_of"]

BINS = 2048
LEVELS = 256  # of an 8-bit code
OUTLIERS = 1e-4  # share of values the percentile observer leaves outside
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """real = scale * (code - zero_point), code in 0..levels-1."""

    scale: float
    zero_point: int
    levels: int = LEVELS


@dataclass
class Range:
    """What was seen of one activation: extremes first, then a histogram between them."""

    low: float = 0.0
    high: float = 0.0
    counts: F64 = field(default_factory=lambda: np.zeros(BINS))

    def widen(self, values: NDArray[np.float32]) -> None:
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    def count(self, values: NDArray[np.float32]) -> None:
        if self.high <= self.low:
            return
        bins = (values.ravel("K") - np.float32(self.low)) * np.float32(BINS / (self.high - self.low))
        self.counts += np.bincount(np.clip(bins, 0, BINS - 1).astype(np.int32), minlength=BINS)

    @property
    def edges(self) -> F64:
        return np.linspace(self.low, self.high, BINS + 1)

    @property
    def centres(self) -> F64:
        edges = self.edges
        return np.asarray((edges[1:] + edges[:-1]) / 2)


Observer = Callable[[Range, int], tuple[float, float]]


def minmax(seen: Range, levels: int = LEVELS) -> tuple[float, float]:
    return seen.low, seen.high


def percentile(seen: Range, levels: int = LEVELS) -> tuple[float, float]:
    total = np.cumsum(seen.counts)
    if not total[-1]:
        return seen.low, seen.high
    share, edges = total / total[-1], seen.edges
    low = edges[int(np.searchsorted(share, OUTLIERS / 2, side="right"))] if seen.low < 0 else 0.0
    high = edges[min(int(np.searchsorted(share, 1 - OUTLIERS / 2)) + 1, BINS)]
    return min(0.0, float(low)), max(0.0, float(high))


def entropy(seen: Range, levels: int = LEVELS) -> tuple[float, float]:
    total = seen.counts.sum()
    if not total:
        return seen.low, seen.high
    return _best_clipping(seen, lambda low, high: _divergence(seen, low, high, levels))


def mse(seen: Range, levels: int = LEVELS) -> tuple[float, float]:
    return _best_clipping(seen, lambda low, high: squared_error(seen, scale_of(low, high, levels=levels)))


def _best_clipping(seen: Range, cost: Callable[[float, float], float]) -> tuple[float, float]:
    best, chosen = np.inf, (seen.low, seen.high)
    for threshold in np.geomspace(1.0, 0.1, 40) * max(-seen.low, seen.high):
        low, high = max(seen.low, -float(threshold)), min(seen.high, float(threshold))
        found = cost(low, high)
        if found < best:
            best, chosen = found, (low, high)
    return chosen


def _divergence(seen: Range, low: float, high: float, levels: int) -> float:
    """KL of the whole histogram from what `levels` steps between low and high leave of it.

    The bin of exact zeros is left out: after a ReLU it holds half of everything and is represented without error.
    """
    centres, counts = seen.centres, seen.counts.copy()
    counts[int(np.argmin(np.abs(centres)))] = 0
    if not counts.sum():
        return 0.0
    level = np.clip(np.floor((centres - low) / max(high - low, 1e-30) * levels), 0, levels - 1).astype(int)
    inside = (centres >= low) & (centres <= high) & (counts > 0)
    mass = np.bincount(level, weights=counts, minlength=levels)  # what is clipped piles up in the outermost levels
    width = np.bincount(level, weights=inside.astype(float), minlength=levels)
    q = np.where(inside, mass[level] / np.maximum(width[level], 1), 0.0)
    p, q = counts / counts.sum(), q / max(float(q.sum()), 1e-30)
    some = p > 0
    return float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-9))).sum())


OBSERVERS: dict[str, Observer] = {"minmax": minmax, "percentile": percentile, "entropy": entropy, "mse": mse}
COMPETING = ("minmax", "percentile", "entropy")  # for `auto`; the mixture of the three has the least squared error already


def squared_error(seen: Range, scale: Scale) -> float:
    """Mean squared rounding and clipping error of the histogram under a scale."""
    centres = seen.centres
    codes = np.clip(np.rint(centres / scale.scale) + scale.zero_point, 0, scale.levels - 1)
    error = (codes - scale.zero_point) * scale.scale - centres
    return float((error**2 * seen.counts).sum() / max(seen.counts.sum(), 1))


def scale_of(low: float, high: float, clamp: tuple[float, float] | None = None, levels: int = LEVELS) -> Scale:
    """The scale whose `levels` codes cover low..high and contain 0 exactly.

    Args:
        clamp: bounds of an absorbed activation function; the codes then never reach outside, so that a runtime may drop it.
    """
    low, high = min(0.0, low), max(0.0, high)
    if clamp is not None:
        low, high = max(low, clamp[0]), min(high, clamp[1])
    top = levels - 1
    scale = np.float32(max((high - low) / top, 1e-8))
    zero_point = int(np.clip(np.rint(-low / float(scale)), 0, top))
    if clamp is not None:
        while (top - zero_point) * scale > np.float32(clamp[1]) or -zero_point * scale < np.float32(clamp[0]):
            room = [
                clamp[1] / max(top - zero_point, 1) if np.isfinite(clamp[1]) else np.inf,
                -clamp[0] / zero_point if zero_point and np.isfinite(clamp[0]) else np.inf,
            ]
            scale = np.nextafter(min(scale, np.float32(min(room))), np.float32(0))
    return Scale(float(scale), zero_point, levels)
