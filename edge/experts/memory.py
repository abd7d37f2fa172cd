"""How records come into a budget and leave it: held by those who compute, waited for, evicted, given back when a read fails.

One lock guards cache, buffers and the store's queues; disk reads and digests run outside it. A record is in `_entries` from the
moment its read is queued until it is evicted or its read fails. Demand reads take memory from read-ahead, never the other way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.experts.buffers import Buffers, Slot
from edge.experts.cache import Cache, check_budget, floor, frequencies, hottest, memory_sizes
from edge.experts.policies import Layout, kept_weights, make_policy
from edge.experts.raw import RawFile, RawReader
from edge.experts.settings import PagerSettings
from edge.experts.store import RecordStore, Ticket
from refold.errors import UsageError
from refold.experts import ExpertIndex

__all__ = ["U8", "Holds", "Memory"]

U8 = NDArray[np.uint8]


@dataclass(eq=False)
class _Entry:
    """A record in memory or on its way.

    Attributes:
        ahead_for: the token that read-ahead brought it for, -1 once that is settled. spoilt: it guessed wrong before it was
        read.
    """

    slot: Slot
    ticket: Ticket
    ahead_for: int = -1
    spoilt: bool = False


@dataclass(eq=False)
class _Wait:
    """Somebody who waits for `need` more records."""

    condition: threading.Condition
    need: int


class Holds:
    """What one request holds. owner: its thread. tickets: by number of the expert."""

    def __init__(self) -> None:
        self.owner = threading.get_ident()
        self.tickets: dict[int, Ticket] = {}


class Memory:
    """The records in memory and on their way. All methods are called under `_lock`.

    Args and errors: as Pager's.
    """

    def __init__(
        self, path: Path, index: ExpertIndex, records_at: int, budget: int, settings: PagerSettings, raw: RawReader | None
    ) -> None:
        self.path, self.index, self.budget = path, index, budget
        s, g = settings, index.geometry
        self.layout = Layout(g.layers, g.experts)
        self._position_of = {layer: p for p, layer in enumerate(g.layers)}
        self._keys = g.keys
        self._records = [index[key] for key in self._keys]
        sizes, self._frequency = memory_sizes(index), frequencies(index)
        self.floor = floor(index, sizes)
        check_budget(index, budget, self.floor, str(path))
        policy = make_policy(s.policy, self.layout, self._frequency, s.weights or kept_weights(path))
        pinned = hottest(self._frequency, sizes, min(int(budget * s.pin), budget - self.floor), s.pin_above)
        self.cache = Cache(sizes, budget, policy, pinned)
        self.buffers = Buffers((r.size for r in self._records), budget)
        self._entries: dict[int, _Entry] = {}
        self._waits: dict[Ticket, list[_Wait]] = {}
        self._holding: dict[int, int] = {}  # records held, by thread
        self._wasted = self._wasted_bytes = 0
        self._stall = 0.0
        self._closed = False
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._store = RecordStore(
            raw or RawFile(path, direct=s.direct, probe=records_at),
            str(path),
            records_at,
            self._lock,
            self._finished,
            threads=s.threads,
            block=s.block,
            verify=s.verify,
        )

    def _warm(self) -> None:
        """Begins with the most frequent experts, the pinned ones among them, as far as memory goes; demand reads go first."""
        for i in np.argsort(-self._frequency, kind="stable").tolist():
            if not self._frequency[i] or self.cache.used + int(self.cache.sizes[i]) > self.budget:
                break
            self._take(i, 0, (), demand=False)

    def _waste(self, entry: _Entry) -> None:
        entry.ahead_for = -1
        self._wasted += 1
        if entry.ticket.ready:
            self._wasted_bytes += entry.ticket.record.size
        else:
            entry.spoilt = True

    def _ready(self, i: int) -> bool:
        entry = self._entries.get(i)
        return entry is not None and entry.ticket.ready

    def _release(self, holds: Holds) -> None:
        for i in holds.tickets:
            self.cache.held[i] -= 1
        if holds.tickets:
            self._holding[holds.owner] -= len(holds.tickets)
            if not self._holding[holds.owner]:
                del self._holding[holds.owner]
            holds.tickets.clear()
            self._changed.notify_all()

    def _begin(self, i: int, position: int, keep: Sequence[int], holds: Holds) -> bool:
        """Holds `i`, which is in memory or on its way from now on. False: there is no memory for it yet."""
        entry = self._entries.get(i)
        if entry is None:
            if not self._take(i, position, keep, demand=True):
                for other in list(self._entries.values()):
                    self._store.cancel(other.ticket)  # demand goes before any read-ahead
                if not self._take(i, position, keep, demand=True):
                    return False
            entry = self._entries[i]
        elif entry.ticket.cancelled:
            return False  # its last block is still being written to
        self._store.promote(entry.ticket)
        self.cache.held[i] += 1
        holds.tickets[i] = entry.ticket
        self._holding[holds.owner] = self._holding.get(holds.owner, 0) + 1
        return True

    def _take(self, i: int, position: int, keep: Sequence[int], *, demand: bool) -> bool:
        gone = self.cache.make_room(int(self.cache.sizes[i]), position, keep)
        if gone is None:
            return False
        self._forget(gone)
        slot = self.buffers.take(self._records[i].size)
        if slot is None:
            raise AssertionError("cache and buffers disagree about memory")
        self.cache.add(i, coming=True)
        self._entries[i] = _Entry(slot, self._store.submit(self._records[i], slot.memory, demand=demand))
        return True

    def _clear(self, ids: list[int], position: int, keep: Sequence[int] | None = None) -> None:
        """Evicts at once for all of these that are not here; where that cannot be, they are begun one by one."""
        need = sum(int(self.cache.sizes[i]) for i in ids if i not in self._entries)
        self._forget(self.cache.make_room(need, position, ids if keep is None else keep) or [])

    def _forget(self, gone: list[int]) -> None:
        for other in gone:
            entry = self._entries.pop(other)
            if entry.ahead_for >= 0:
                self._waste(entry)
            self.buffers.give_back(entry.slot)

    def _pause(self, holds: Holds) -> None:
        """Until memory is given back. Raises UsageError where only this thread could give it back."""
        others = any(thread != holds.owner for thread in self._holding)
        if not others and not self.cache.coming.any():
            raise UsageError(
                f"There is no memory for another expert: this thread holds all {self.budget:,} bytes. Leave `use` first.",
                code="budget",
            )
        self._changed.wait(1.0)
        self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("The pager was closed while its experts were asked for.")

    def _await(self, holds: Holds, begin: float, least: int | None = None) -> None:
        """Until `least` of the records are here, all of them by default; woken once, not by every record."""
        tickets = list(holds.tickets.values())
        coming = [t for t in tickets if not t.done]
        need = (len(tickets) if least is None else least) - (len(tickets) - len(coming))
        if need > 0:
            wait = _Wait(threading.Condition(self._lock), need)
            for t in coming:
                self._waits.setdefault(t, []).append(wait)
            while wait.need > 0 and not any(t.error for t in tickets):
                wait.condition.wait(1.0)
                self._check_open()
            self._stall += time.perf_counter() - begin
        for error in (t.error for t in tickets if t.error is not None):
            raise type(error)(error.message, code=error.code, detail=error.detail)  # each who waits has a traceback of its own

    def _stream(self, left: list[int], loading: Holds, position: int, window: int, *, wait: bool = False) -> None:
        """Begins reads of a wave within the window; waits for memory only where nothing is on its way."""
        flying = sum(int(self.cache.sizes[i]) for i in loading.tickets)
        while left and (not loading.tickets or flying + int(self.cache.sizes[left[0]]) <= window):
            if not self._begin(left[0], position, (), loading):
                if loading.tickets or not wait:
                    return
                self._pause(loading)
                continue
            flying += int(self.cache.sizes[left[0]])
            left.pop(0)

    def _wave(self, held: Holds) -> tuple[list[int], list[U8]]:
        return [self._keys[i][1] for i in held.tickets], [self._entries[i].slot.memory for i in held.tickets]

    def _finished(self, ticket: Ticket) -> None:
        """By a reader or by cancel: the record is here, or its memory is free again."""
        i = self._position_of[ticket.record.layer] * self.layout.experts + ticket.record.expert
        entry = self._entries[i]
        self.cache.coming[i] = False
        if not ticket.ready:
            if entry.ahead_for >= 0:
                self._waste(entry)
            del self._entries[i]
            self.cache.drop(i)
            self.buffers.give_back(entry.slot)
        if entry.spoilt:
            self._wasted_bytes += ticket.read
        for wait in self._waits.pop(ticket, ()):
            wait.need -= 1
            if wait.need <= 0 or ticket.error is not None:
                wait.condition.notify()
        self._changed.notify_all()
