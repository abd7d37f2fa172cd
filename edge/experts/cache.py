"""Which records are in memory under a byte budget: accounting only, the same for the pager and for replay.

A record that is held (computed with), coming (being read) or pinned never leaves. Of the others the one of least worth leaves
first; those that read-ahead expects to be asked for (`soon`) leave only when nothing else can. Sizes do not enter the worth: a
miss costs bytes in the same measure as an eviction frees them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from edge.experts.buffers import stride
from edge.experts.policies import F64, I64, Policy
from refold.errors import UsageError
from refold.experts import ExpertIndex

__all__ = ["Cache", "check_budget", "floor", "frequencies", "hottest", "memory_sizes"]


class Cache:
    """Not thread-safe: the pager calls it under its lock.

    Args:
        sizes: int64 (count,), bytes each record takes in memory.
        pinned: numbers of experts that never leave once they are here.

    Attributes:
        present: bool (count,), in memory or on its way. used: bytes of those.
    """

    def __init__(self, sizes: I64, budget: int, policy: Policy, pinned: Iterable[int] = ()) -> None:
        self.sizes, self.budget, self.policy = sizes, budget, policy
        self.present: NDArray[np.bool_] = np.zeros(len(sizes), np.bool_)
        self.coming: NDArray[np.bool_] = np.zeros(len(sizes), np.bool_)
        self.soon: NDArray[np.bool_] = np.zeros(len(sizes), np.bool_)
        self.held: NDArray[np.int32] = np.zeros(len(sizes), np.int32)
        self.pinned: NDArray[np.bool_] = np.zeros(len(sizes), np.bool_)
        self.pinned[list(pinned)] = True
        self.used = 0
        self.evictions = 0

    def make_room(self, need: int, position: int, keep: Sequence[int] = ()) -> list[int] | None:
        """Evicts until `need` bytes are free.

        Args:
            position: of the layer that runs now.
            keep: numbers that must not leave although nobody holds them yet.

        Returns:
            Who left, possibly nobody; None, and nobody left, where no eviction could free enough.
        """
        over = self.used + need - self.budget
        if over <= 0:
            return []
        may = self.present & ~self.coming & ~self.pinned & (self.held == 0)
        may[list(keep)] = False
        candidates = np.flatnonzero(may)
        if int(self.sizes[candidates].sum()) < over:
            return None
        worth: F64 = self.policy.worth(position)[candidates]
        order = candidates[np.lexsort((worth, self.soon[candidates]))]
        count = int(np.searchsorted(np.cumsum(self.sizes[order]), over)) + 1
        gone = [int(i) for i in order[:count]]
        for i in gone:
            self.drop(i)
        self.evictions += len(gone)
        return gone

    def add(self, number: int, *, coming: bool = False) -> None:
        """There must be room."""
        self.present[number] = True
        self.coming[number] = coming
        self.used += int(self.sizes[number])

    def drop(self, number: int) -> None:
        self.present[number] = self.coming[number] = False
        self.used -= int(self.sizes[number])


def memory_sizes(index: ExpertIndex) -> I64:
    """int64 (count,): bytes that each record takes in memory, in the order of policies.Layout."""
    return np.array([stride(index[key].size) for key in index.geometry.keys], np.int64)


def frequencies(index: ExpertIndex) -> F64:
    """float64 (count,): shares of a layer's tokens that used each expert when it was exported; 0 where nothing was measured."""
    return np.array([index.frequency.get(key, 0.0) for key in index.geometry.keys])


def floor(index: ExpertIndex, sizes: I64 | None = None) -> int:
    """Least budget a model runs with: the largest top-k records of its worst layer and one more in flight.

    Args:
        sizes: int64 (count,), bytes that each record takes; None: those of the file.
    """
    g = index.geometry
    told = np.array([index[key].size for key in g.keys], np.int64) if sizes is None else sizes
    worst = np.sort(told.reshape(len(g.layers), g.experts), axis=1)[:, -g.top_k :].sum(1).max()
    return int(worst + told.max())


def hottest(frequency: F64, sizes: I64, share: int, above: float) -> list[int]:
    """Experts that more than `above` of a layer's tokens use, the most used first, as many as `share` bytes hold."""
    out, left = [], share
    for i in np.argsort(-frequency, kind="stable"):
        if frequency[i] <= above or sizes[i] > left:
            break
        out.append(int(i))
        left -= int(sizes[i])
    return out


def check_budget(index: ExpertIndex, budget: int, least: int, name: str) -> None:
    """Raises UsageError with the least budget where `budget` is under it."""
    if budget < least:
        g = index.geometry
        raise UsageError(
            f"{budget:,} bytes cannot hold the experts of {name}: one layer's top {g.top_k} and one in flight take {least:,}. "
            f"Give --memory at least {-(-least // 1000)}KB for experts, or export with fewer bits.",
            code="budget",
        )
