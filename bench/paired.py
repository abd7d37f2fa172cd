"""Two ways of doing the same thing, timed in turn, so that a machine whose speed drifts slows both alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

__all__ = ["Paired", "paired"]


@dataclass(frozen=True)
class Paired:
    """Seconds of each block. `ratio` is the median over pairs of first ÷ second."""

    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.first, self.second, strict=True)]

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    def each(self, count: int) -> tuple[float, float]:
        """Median milliseconds of one of `count` repetitions in a block, of first and of second."""
        return 1e3 * median(self.first) / count, 1e3 * median(self.second) / count


def paired(
    first: Callable[[], object],
    second: Callable[[], object],
    pairs: int,
    *,
    before_each: Callable[[], object] | None = None,
    after_pair: Callable[[int], object] | None = None,
) -> Paired:
    """Blocks in the order A B, B A, A B, ... after one uncounted pair. Garbage is collected before, not during, a block."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for i in range(pairs + 1):
        for which in (0, 1) if i % 2 else (1, 0):
            if before_each is not None:
                before_each()
            gc.collect()
            started = time.perf_counter()
            (first, second)[which]()
            elapsed = time.perf_counter() - started
            if i:
                times[which].append(elapsed)
        if i and after_pair is not None:
            after_pair(i)
    return Paired(tuple(times[0]), tuple(times[1]))
