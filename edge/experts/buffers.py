"""The memory records live in: page-aligned anonymous mappings, one per record size, whose touched pages never exceed the
budget.

A model has as many record sizes as it has bit-widths, three at most. Each size has its own run of slots in address space,
which costs nothing until touched; a slot that is given back stays warm for the next record of its size, and is returned to the
kernel (madvise DONTNEED) when another size needs its bytes. So there is no fragmentation, no copying and no growth.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Buffers", "Slot", "stride"]

NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0)


def stride(size: int) -> int:
    """Bytes that a record of `size` takes in memory: whole pages."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


@dataclass(frozen=True, eq=False)
class Slot:
    """Room for one record. memory: uint8 (size,), page-aligned, valid until the slot is given back."""

    size: int
    number: int
    memory: NDArray[np.uint8]


class _Run:
    """All slots of one size."""

    def __init__(self, size: int, count: int, uniform: bool) -> None:
        self.size, self.step, self.count = size, stride(size), count
        self.map = mmap.mmap(-1, self.step * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        advice = getattr(mmap, "MADV_HUGEPAGE" if uniform else "MADV_NOHUGEPAGE", None)
        if advice is not None:  # huge pages straddle slots: only where no slot is ever given back to the kernel
            try:
                self.map.madvise(advice)
            except OSError:
                pass  # a kernel without transparent huge pages
        self.bytes: NDArray[np.uint8] = np.frombuffer(self.map, np.uint8)
        self.warm: list[int] = []
        self.cold = list(range(count - 1, -1, -1))

    def slot(self, number: int) -> Slot:
        at = number * self.step
        return Slot(self.size, number, self.bytes[at : at + self.size])


class Buffers:
    """Slots under a budget. Not thread-safe: the pager calls it under its lock.

    Args:
        sizes: the record sizes there are.
        budget: bytes of touched memory at most.

    Attributes:
        resident: bytes of touched slots, in use or warm.
    """

    def __init__(self, sizes: Iterable[int], budget: int) -> None:
        distinct = sorted(set(sizes))
        self.budget, self.resident = budget, 0
        self._runs = {
            size: _Run(size, budget // stride(size), len(distinct) == 1) for size in distinct if budget >= stride(size)
        }

    def take(self, size: int) -> Slot | None:
        """A slot for a record of `size` bytes, or None where slots in use leave no room."""
        run = self._runs[size]
        if run.warm:
            return run.slot(run.warm.pop())
        self._cool(self.resident + run.step - self.budget)
        if self.resident + run.step > self.budget or not run.cold:
            return None
        self.resident += run.step
        return run.slot(run.cold.pop())

    def give_back(self, slot: Slot) -> None:
        self._runs[slot.size].warm.append(slot.number)

    def _cool(self, need: int) -> None:
        """Returns warm slots to the kernel until `need` bytes are free."""
        for run in self._runs.values():
            while need > 0 and run.warm:
                number = run.warm.pop()
                run.map.madvise(mmap.MADV_DONTNEED, number * run.step, run.step)
                run.cold.append(number)
                self.resident -= run.step
                need -= run.step

    def close(self) -> None:
        """Returns the memory. A view that somebody still holds reads zeros from now on."""
        for run in self._runs.values():
            run.map.madvise(mmap.MADV_DONTNEED)
            held: Any = run
            held.bytes = None
            try:
                run.map.close()
            except BufferError:
                pass  # unmapped with the last view
        self._runs.clear()
        self.resident = 0
