"""When a tensor gets how many bits: AdaPT's precision switch, as functions of values.

    push down   to the fewest bits that lose nothing: the histogram of the quantised weights stays that of the master weights
    push up     to as many as learning needs: few where gradients agree, more where they cancel

A switch does both, in this order. Formulae: Kummer et al., arXiv 2107.13490; what the published code does otherwise, and why it
is not repeated here, is in docs/guide/fixed-point.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from statistics import mean, variance

import torch
from torch import Tensor

from export.fixed_point.number import FixedPoint, largest_fraction

__all__ = [
    "Bounds",
    "Strategy",
    "divergence",
    "gradient_diversity",
    "lookback_after",
    "next_strategy",
    "push_down",
    "push_up",
    "resolution_after",
]

SMALLEST_FRACTION = 4  # where every tensor starts, and under which no push-down goes
ADDED = 1e-12  # to every bin of both histograms


class Strategy(IntEnum):
    """How eager a push-up is; they take turns, in this order, while the loss does not fall."""

    MIN = 0
    MEAN = 1
    MAX = 2


@dataclass(frozen=True)
class Bounds:
    """What limits the formats.

    Attributes:
        longest: bits of the longest word; the paper's 32, or 8 for an integer engine.
        buffer: bits a word keeps above its fraction (8 in the paper); None: as many as the largest weight needs, which may be
            fewer than none, as in <8,9> for weights under 1/4.
    """

    longest: int = 32
    buffer: int | None = 8

    def before_point(self, largest: float) -> int:
        """Bits that stand above the fraction, the sign among them."""
        if self.buffer is not None:
            return self.buffer
        return self.longest - largest_fraction(self.longest, largest)


def gradient_diversity(count: int, norm_of_sum: float) -> float:
    """sum of ||g_i|| / ||sum of g_i|| for `count` unit vectors: 1 when all agree, sqrt(count) for independent ones, inf when
    they cancel. (A ratio of norms; Yin et al. 2018 define it with squares.)"""
    return max(1.0, count / norm_of_sum) if norm_of_sum > 0 else math.inf


def lookback_after(lookback: int, diversity: float, shortest: int, longest: int, momentum: float) -> int:
    """Steps until the next switch: diverse gradients need the precision looked at sooner."""
    new = math.ceil(min(max(longest / diversity, shortest), longest))
    return math.ceil(momentum * new + (1 - momentum) * lookback)


def resolution_after(resolution: int, lookback: int, shortest: int, longest: int, bins: tuple[int, int]) -> int:
    """Bins of the next push-down's histogram: one more where switches have become rare, one fewer where they crowd."""
    step = (lookback == longest) - (lookback == shortest)
    return min(max(resolution + step, bins[0]), bins[1])


def next_strategy(
    strategy: Strategy, losses: Sequence[float], now: float, mean_lookback: float, errors: float | None = None
) -> Strategy:
    """One step more eager when the loss makes no progress; else back to MIN.

    Args:
        losses: of the steps before. now: of this one. mean_lookback: steps that are looked back at.
        errors: None, as published: no progress is a loss now that is not under the mean of the last `mean_lookback` steps. One
            step's loss lies above that mean half of the time whatever happens. A number: no progress is a mean of the last
            `mean_lookback` steps that lies above the mean of as many before them by more than so many standard errors.
    """
    many = max(1, math.ceil(mean_lookback))
    if errors is None:
        recent = list(losses)[-many:]
        stuck = bool(recent) and abs(sum(recent) / len(recent)) <= abs(now)
    else:
        late = [*losses, now][-many:]
        early = [*losses, now][-2 * many : -many]
        stuck = (
            len(early) > 1
            and len(late) > 1
            and mean(late) - mean(early) > errors * math.sqrt(variance(late) / len(late) + variance(early) / len(early))
        )
    return Strategy(min(strategy + 1, Strategy.MAX)) if stuck else Strategy.MIN


def divergence(master: Tensor, quantised: Tensor, bins: int) -> float:
    """KL(P || Q) in nats, P the histogram of `master` over its own range, Q that of `quantised` over the same bins.

    What quantisation moved out of the range counts in the outermost bins, so that both have all the mass.
    """
    low, high = float(master.min()), float(master.max())
    if low == high:
        return 0.0 if bool((quantised == master).all()) else math.inf
    p, q = (torch.histc(t.clamp(low, high).double(), bins, low, high) / t.numel() + ADDED for t in (master, quantised))
    return max(0.0, float((p * (p / q).log()).sum()))


def push_down(form: FixedPoint, master: Tensor, bins: int, tolerance: float, bounds: Bounds) -> FixedPoint:
    """The shortest format in which the weights' histogram is kept to within `tolerance` nats.

    First the fraction between 4 and the present one, at the present word; then the word. Both by bisection, rounding to
    nearest. Where no shorter format passes, the present one stays, whatever its own divergence.
    """

    def passes(word: int, fraction: int) -> bool:
        shorter = FixedPoint(word, fraction, form.signed, form.narrow)
        return divergence(master, shorter.nearest(master), bins) <= tolerance

    fraction = _lowest(min(SMALLEST_FRACTION, form.fraction), form.fraction, lambda f: passes(form.word, f))
    least = 2 if bounds.buffer is None else max(2, min(fraction, form.word))
    word = _lowest(least, form.word, lambda w: passes(w, fraction))
    return FixedPoint(word, fraction, form.signed, form.narrow)


def _lowest(low: int, high: int, passes: Callable[[int], bool]) -> int:
    """The lowest passing number between low and high, where what passes stays passing further up; high is not asked."""
    while low < high:
        middle = (low + high) // 2
        if passes(middle):
            high = middle
        else:
            low = middle + 1
    return high


def push_up(form: FixedPoint, diversity: float, strategy: Strategy, largest: float, bounds: Bounds) -> FixedPoint:
    """A longer format, by how much the gradients of the last steps differed.

    d = ln(diversity) - 1.  For d > 0: s1 = max(ceil(1 / d^2), 1), s2 = max(min(ceil(L d^2), L) - bits, 0), s = their min,
    ceil(mean) or max by strategy; else s = 1.  Then the word and its fraction grow.

    With a buffer, as published: L = 32 and `bits` is the fraction, which grows by s; the word grows by one more bit at every
    switch, and keeps the buffer above its fraction. Without one: L is the longest word and `bits` the word's length; both grow
    by s, and further only where the largest weight needs it. With L = 32 every word of up to 8 bits would end at its longest:
    25 independent gradients (diversity 5, d^2 = 0.37) ask for 12 bits of 32, more than an 8-bit word has, but for 3 of 8.

    Args:
        largest: magnitude of the largest master weight.
    """
    d, longest, measured = math.log(diversity) - 1, bounds.longest, bounds.buffer is None
    whole, bits = (longest, form.word) if measured else (32, form.fraction)
    added = 1
    if math.isinf(d):
        added = _chosen(1, max(whole - bits, 0), strategy)
    elif d > 0:
        s1 = max(math.ceil(1 / max(d**2, ADDED)), 1)
        s2 = max(min(math.ceil(whole * d**2), whole) - bits, 0)
        added = _chosen(s1, s2, strategy)
    above = bounds.before_point(largest)
    fraction = min(form.fraction + added, longest - above)
    grown = form.word + added if measured else max(form.word, min(form.fraction + added, longest)) + 1
    word = max(min(grown, longest), min(fraction + above, longest))
    return FixedPoint(word, fraction, form.signed, form.narrow)


def _chosen(s1: int, s2: int, strategy: Strategy) -> int:
    if strategy is Strategy.MIN:
        return min(s1, s2)
    return max(s1, s2) if strategy is Strategy.MAX else math.ceil((s1 + s2) / 2)
