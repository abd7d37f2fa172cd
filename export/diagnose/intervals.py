"""Exact statements about shares of few images: Clopper and Pearson's interval, binomial tails, McNemar's exact test.

C. J. Clopper and E. S. Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
Biometrika 26 (1934); Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
Psychometrika 12 (1947), in its exact binomial form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONFIDENCE", "at_least", "at_most", "interval", "paired"]

CONFIDENCE = 0.95  # of the intervals that are printed and judged by
BISECTIONS = 60


def _tail(low: int, high: int, count: int, share: float) -> float:
    """P(low <= X <= high), X binomial."""
    if low > high:
        return 0.0
    if share <= 0.0 or share >= 1.0:
        return float(low <= (0 if share <= 0.0 else count) <= high)
    k, factorial = np.arange(low, high + 1), _log_factorials(count)
    ways = factorial[count] - factorial[k] - factorial[count - k]
    return float(min(np.exp(ways + k * math.log(share) + (count - k) * math.log1p(-share)).sum(), 1.0))


@lru_cache(maxsize=16)
def _log_factorials(most: int) -> NDArray[np.float64]:
    """log(n!) for n from 0 to most."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most + 1)))])


def at_least(hits: int, count: int, share: float) -> float:
    """Probability of `hits` or more of `count` where each comes with probability `share`."""
    return _tail(hits, count, count, share)


def at_most(hits: int, count: int, share: float) -> float:
    """Probability of `hits` or fewer of `count` where each comes with probability `share`."""
    return _tail(0, hits, count, share)


def interval(hits: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The two-sided Clopper-Pearson interval of the share behind `hits` of `count`; (0, 1) where nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    beyond = (1 - confidence) / 2
    low = 0.0 if hits == 0 else _root(lambda p: at_least(hits, count, p) < beyond)
    high = 1.0 if hits == count else _root(lambda p: at_most(hits, count, p) >= beyond)
    return low, high


def paired(better: int, worse: int) -> float:
    """One-sided exact McNemar test.

    Args:
        better: images that only the second of two classifiers gets right.
        worse: images that only the first gets right.

    Returns:
        The probability of so many or more for the second if both were equally good.
    """
    return at_least(better, better + worse, 0.5)


def _root(below: Callable[[float], bool]) -> float:
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if below(middle):
            low = middle
        else:
            high = middle
    return (low + high) / 2
