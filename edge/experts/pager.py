"""Experts in a byte budget: whoever computes asks for a layer's experts and gets their records, from memory or from the disk.

    with Pager.open(model, budget) as pager:
        with pager.use(layer, experts) as records:       uint8 arrays in the order asked, pinned inside the block
            ...
        pager.hint(layer + 1, likely, confidence)        read-ahead that no demand read ever waits for
        for experts, records in pager.waves(layer, union): ...   however many: those in memory first, the rest as they come
        pager.token()                                    the token has ended

One lock guards cache, buffers and the store's queues; disk reads and digests run outside it. Records are valid only inside
their
block: the buffer is reused.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge.experts.buffers import Buffers, Slot, stride
from edge.experts.cache import Cache, check_budget, floor, hottest
from edge.experts.counters import Counters, TokenRecord
from edge.experts.paths import PathTable
from edge.experts.policies import I64, Layout, kept_weights, make_policy
from edge.experts.predict import ReadAhead
from edge.experts.raw import RawFile, RawReader
from edge.experts.settings import PagerSettings
from edge.experts.store import RecordStore, Ticket
from edge.experts.trace import TraceWriter
from refold.errors import UsageError
from refold.experts import ExpertIndex

__all__ = ["Paged", "Pager", "PagerSettings"]

U8 = NDArray[np.uint8]


class Paged(Protocol):
    """What `refold.experts.paged.PagedModel` tells a pager."""

    @property
    def path(self) -> Path: ...
    @property
    def index(self) -> ExpertIndex: ...
    @property
    def records_at(self) -> int: ...


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


class _Holds:
    """What one request holds. owner: its thread."""

    def __init__(self) -> None:
        self.owner = threading.get_ident()
        self.tickets: dict[int, Ticket] = {}


class Pager:
    """Thread-safe for one model.

    Args:
        path: the file. records_at: offset of its records. budget: bytes of memory for records.
        raw: reads the file; a test's double.

    Raises:
        UsageError: the budget is under the floor, or a setting is wrong. StorageError: the file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        index: ExpertIndex,
        records_at: int,
        budget: int,
        settings: PagerSettings | None = None,
        raw: RawReader | None = None,
    ) -> None:
        self.path, self.index, self.budget = path, index, budget
        self.settings = s = settings or PagerSettings()
        g = index.geometry
        self.layout = Layout(g.layers, g.experts)
        self._position_of = {layer: p for p, layer in enumerate(g.layers)}
        self._keys = [(layer, e) for layer in g.layers for e in range(g.experts)]
        self._records = [index[key] for key in self._keys]
        sizes: I64 = np.array([stride(r.size) for r in self._records], np.int64)
        self.floor = floor(index, dict(zip(self._keys, sizes.tolist(), strict=True)))
        check_budget(index, budget, self.floor, str(path))
        frequency = np.array([index.frequency.get(key, 0.0) for key in self._keys])
        pinned = hottest(frequency, sizes, min(int(budget * s.pin), budget - self.floor), s.pin_above)
        self.cache = Cache(
            sizes, budget, make_policy(s.policy, self.layout, frequency, s.weights or kept_weights(path)), pinned
        )
        self._entries: dict[int, _Entry] = {}
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._holding: dict[int, int] = {}  # records held, by thread
        self._token, self._position = 0, -1
        self._hits = self._covered = self._late = self._misses = self._useful = self._wasted = self._wasted_bytes = 0
        self._stall = 0.0
        self._mark = (0, 0, 0, 0.0)
        self.history: deque[TokenRecord] = deque(maxlen=65536)
        self._trace: TraceWriter | None = None
        self._closed = False
        self.paths = PathTable.load(s.paths_file(path), index, order=s.path_order) if s.ahead else None
        limit = max(min(int(budget * s.ahead_share), budget - self.floor - int(sizes[pinned].sum())), 0)
        self.ahead = ReadAhead(self.layout, g.top_k, limit, s.threshold)
        self._pending: dict[int, set[int]] = {}  # by position: numbers read ahead and not yet asked for
        self.buffers = Buffers((r.size for r in self._records), budget)
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
        with self._lock:
            self._warm(pinned, frequency)

    @classmethod
    def open(cls, model: Paged, budget: int, settings: PagerSettings | None = None) -> Pager:
        """Of a bundle. Raises as the constructor."""
        return cls(Path(model.path), model.index, model.records_at, budget, settings)

    # What callers do

    @contextmanager
    def use(self, layer: int, experts: Sequence[int]) -> Iterator[list[U8]]:
        """Records of these experts, in order; they stay in memory inside the block.

        Args:
            layer: as in the geometry. experts: at most as many as the budget holds; doubles are permitted.

        Returns:
            uint8 (size,) per expert, the whole record.

        Raises:
            UsageError: no such layer or expert, or more bytes than the budget holds: use `waves`.
            BundleError: a record is damaged. StorageError: the disk failed or the file ends early.
        """
        with self._lock:
            position, ids = self._ask(layer, experts)
            unique = list(dict.fromkeys(ids))
            room = self.budget - int(self.cache.sizes[self.cache.pinned].sum())
            if sum(int(self.cache.sizes[i]) for i in unique if not self.cache.pinned[i]) > room:
                raise UsageError(
                    f"{len(unique)} experts of layer {layer} are more than {self.budget:,} bytes hold at once: ask in waves.",
                    code="budget",
                )
            holds = _Holds()
            try:
                begin = time.perf_counter()
                self._settle(position, unique)
                for i in unique:
                    while not self._begin(i, position, unique, holds):
                        self._pause(holds)
                self._predict(position)
                self._await(holds, begin)
                records = [self._entries[i].slot.memory for i in ids]
            except BaseException:
                self._release(holds)
                raise
        try:
            yield records
        finally:
            with self._lock:
                self._release(holds)

    def waves(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[list[int], list[U8]]]:
        """A union of any size, each expert once: those in memory first, then others as they come, read while the caller
        computes.

        Args:
            experts: in the order of wish, as in the largest group of tokens first.

        Returns:
            (experts, records) per wave; the records are valid until the next wave is asked for.

        Raises:
            As `use`, but for the size.
        """
        loading, held = _Holds(), _Holds()
        try:
            with self._lock:
                position, ids = self._ask(layer, experts)
                left = list(dict.fromkeys(ids))
                self._settle(position, left)
                window = max(4 * int(self.cache.sizes.max()), self.budget // 8)
                for i in [i for i in left if self._ready(i)]:
                    self._begin(i, position, (), held)
                    left.remove(i)
                self._stream(left, loading, position, window)
                self._predict(position)
                wave = self._wave(held)
            if wave[0]:
                yield wave
            while left or loading.tickets:
                with self._lock:
                    self._release(held)
                    begin = time.perf_counter()
                    self._stream(left, loading, position, window)
                    self._await_one(loading, begin)
                    for i in [i for i, t in loading.tickets.items() if t.done]:
                        held.tickets[i] = loading.tickets.pop(i)
                    self._stream(left, loading, position, window)
                    wave = self._wave(held)
                yield wave
        finally:
            with self._lock:
                self._release(held)
                self._release(loading)

    def hint(self, layer: int, experts: Sequence[int], confidence: Sequence[float] | None = None) -> None:
        """Experts that a layer will probably ask for, the likeliest first. Never blocks, never delays a demand read.

        Args:
            confidence: 0 to 1 each; without it, what hints of that rank have been worth so far.
        """
        if not self.settings.ahead:
            return
        with self._lock:
            position, ids = self._numbers(layer, experts)
            self.ahead.hinted(position, self._token)
            self._read_ahead(position, ids, self.ahead.choose(position, ids, confidence))

    def token(self) -> None:
        """The token has ended; of prefill, the chunk."""
        with self._lock:
            self.cache.policy.token()
            done = (self._hits + self._covered + self._misses, self._hits, self._read_bytes, self._stall)
            self.history.append(
                TokenRecord(done[0] - self._mark[0], done[1] - self._mark[1], done[2] - self._mark[2], done[3] - self._mark[3])
            )
            self._mark = done
            self._token += 1
            self._position = -1
            if self._trace is not None:
                self._trace.token()

    def trace_to(self, writer: TraceWriter | None) -> None:
        """From now on each request goes to `writer` too; None ends that. The caller closes it."""
        with self._lock:
            self._trace = writer

    @property
    def counters(self) -> Counters:
        with self._lock:
            disk = self._store.disk
            return Counters(
                tokens=self._token,
                asked=self._hits + self._covered + self._misses,
                hits=self._hits,
                covered=self._covered,
                late=self._late,
                misses=self._misses,
                bytes_read=disk.demand_bytes + disk.ahead_bytes,
                demand_bytes=disk.demand_bytes,
                ahead_bytes=disk.ahead_bytes,
                stall_seconds=self._stall,
                busy_seconds=disk.busy_seconds,
                ahead_useful=self._useful,
                ahead_wasted=self._wasted,
                ahead_wasted_bytes=self._wasted_bytes,
                evictions=self.cache.evictions,
                reread=disk.again,
                resident_bytes=self.buffers.resident,
                budget=self.budget,
            )

    def save(self) -> None:
        """Writes the path table, in one step. Raises StorageError."""
        if self.paths is not None:
            with self._lock:
                content = self.paths.dump()
            self.paths.write(content)

    def close(self) -> None:
        """Ends the readers, saves what was learnt of paths and returns the memory."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            held = bool(self._holding)
        self._store.close()
        self._entries.clear()
        if not held:  # memory that somebody still computes with goes with its last view
            self.buffers.close()
        if self.paths is not None and self.paths.learnt:
            self.paths.save_or_warn()

    def __enter__(self) -> Pager:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Under the lock

    @property
    def _read_bytes(self) -> int:
        return self._store.disk.demand_bytes + self._store.disk.ahead_bytes

    def _numbers(self, layer: int, experts: Sequence[int]) -> tuple[int, list[int]]:
        if self._closed:
            raise UsageError("The pager is closed.")
        if layer not in self._position_of:
            raise UsageError(f"Layer {layer} of {self.path} has no experts; those that have: {self.layout.layers}.")
        position, count = self._position_of[layer], self.layout.experts
        ids = [int(e) for e in experts]
        for e in ids:
            if not 0 <= e < count:
                raise UsageError(f"Layer {layer} of {self.path} has experts 0 to {count - 1}, not {e}.")
        return position, [position * count + e for e in ids]

    def _ask(self, layer: int, experts: Sequence[int]) -> tuple[int, list[int]]:
        position, ids = self._numbers(layer, experts)
        self._position = position
        return position, ids

    def _settle(self, position: int, ids: list[int]) -> None:
        """Counts a layer's request, teaches policy and predictor, and stops read-ahead that guessed wrong."""
        wanted = set(ids)
        for i in ids:
            entry = self._entries.get(i)
            if entry is None or entry.ticket.cancelled:
                self._misses += 1
            elif entry.ahead_for >= self._token:
                self._covered += 1
                self._useful += 1
                self._late += not entry.ticket.done
            elif entry.ticket.done:
                self._hits += 1
            else:
                self._misses += 1
            if entry is not None:
                entry.ahead_for = -1
                self._store.promote(entry.ticket)
        for i in self._pending.pop(position, set()) - wanted:
            entry = self._entries.get(i)
            if entry is not None and entry.ahead_for >= 0:
                self._waste(entry)
                self._store.cancel(entry.ticket)
        count = self.layout.experts
        self.cache.soon[position * count : (position + 1) * count] = False
        numbers: I64 = np.array(ids, np.int64)
        self.cache.policy.used(numbers)
        self.ahead.asked(position, wanted)
        if self.paths is not None:
            self.paths.learn(position, numbers - position * count)
        if self._trace is not None:
            self._trace.layer(position, [i - position * count for i in ids])

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

    def _release(self, holds: _Holds) -> None:
        for i in holds.tickets:
            self.cache.held[i] -= 1
        if holds.tickets:
            self._holding[holds.owner] -= len(holds.tickets)
            if not self._holding[holds.owner]:
                del self._holding[holds.owner]
            holds.tickets.clear()
            self._changed.notify_all()

    def _begin(self, i: int, position: int, keep: Sequence[int], holds: _Holds) -> bool:
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
        for other in gone:
            entry = self._entries.pop(other)
            if entry.ahead_for >= 0:
                self._waste(entry)
            self.buffers.give_back(entry.slot)
        slot = self.buffers.take(self._records[i].size)
        if slot is None:
            raise AssertionError("cache and buffers disagree about memory")
        self.cache.add(i, coming=True)
        self._entries[i] = _Entry(slot, self._store.submit(self._records[i], slot.memory, demand=demand))
        return True

    def _pause(self, holds: _Holds) -> None:
        """Until memory is given back. Raises UsageError where only this thread could give it back."""
        others = any(thread != holds.owner for thread in self._holding)
        if not others and not self.cache.coming.any():
            raise UsageError(
                f"There is no memory for another expert: this thread holds all {self.budget:,} bytes. Leave `use` first.",
                code="budget",
            )
        self._wait()

    def _wait(self) -> None:
        self._changed.wait(1.0)
        if self._closed:
            raise UsageError("The pager was closed while its experts were asked for.")

    def _await(self, holds: _Holds, begin: float) -> None:
        tickets = list(holds.tickets.values())
        waited = False
        while not all(t.done for t in tickets):
            waited = True
            self._wait()
        if waited:
            self._stall += time.perf_counter() - begin
        _raise_first(tickets)

    def _await_one(self, loading: _Holds, begin: float) -> None:
        tickets = list(loading.tickets.values())
        waited = False
        while not any(t.done for t in tickets):
            waited = True
            self._wait()
        if waited:
            self._stall += time.perf_counter() - begin
        _raise_first(tickets)

    def _stream(self, left: list[int], loading: _Holds, position: int, window: int) -> None:
        """Begins reads of a wave within the window; waits for memory only where nothing is held or on its way."""
        flying = sum(int(self.cache.sizes[i]) for i in loading.tickets)
        while left and (not loading.tickets or flying + int(self.cache.sizes[left[0]]) <= window):
            if not self._begin(left[0], position, (), loading):
                if loading.tickets or loading.owner in self._holding:
                    return
                self._pause(loading)
                continue
            flying += int(self.cache.sizes[left[0]])
            left.pop(0)

    def _wave(self, held: _Holds) -> tuple[list[int], list[U8]]:
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
        self._changed.notify_all()

    def _predict(self, position: int) -> None:
        """Reads ahead along the paths for the next layer, where no hint comes from the model."""
        if self.paths is None:
            return
        following = self.ahead.following(position)
        if self.ahead.hints_come(following, self._token):
            return
        guess = self.paths.predict(following)
        if guess is not None:
            experts, confidence = guess
            ids = [following * self.layout.experts + int(e) for e in experts]
            self._read_ahead(following, ids, self.ahead.choose(following, ids, confidence.tolist()))

    def _read_ahead(self, position: int, ids: list[int], chosen: list[int]) -> None:
        target = self._token if position > self._position else self._token + 1
        self.cache.soon[chosen] = True
        pending = self._pending.setdefault(position, set())
        flying = sum(int(self.cache.sizes[i]) for i in self._entries if self.cache.coming[i])
        keep = np.flatnonzero(self.cache.soon).tolist()
        for i in chosen:
            entry = self._entries.get(i)
            size = int(self.cache.sizes[i])
            if entry is not None or flying + size > self.ahead.limit:
                continue
            if not self._take(i, max(self._position, 0), keep, demand=False):
                return
            self._entries[i].ahead_for = target
            pending.add(i)
            flying += size

    def _warm(self, pinned: Sequence[int], frequency: NDArray[np.float64]) -> None:
        """Begins with the pinned and then the most frequent experts, as far as memory goes; demand reads go first."""
        order = list(pinned)
        if self.settings.warm and frequency.any():
            order += [int(i) for i in np.argsort(-frequency, kind="stable") if i not in set(pinned)]
        for i in order:
            if self.cache.used + int(self.cache.sizes[i]) > self.budget:
                break
            self._take(i, 0, (), demand=False)


def _raise_first(tickets: Sequence[Ticket]) -> None:
    """A fresh error, as several may wait for one ticket and each gets its own traceback."""
    for error in (t.error for t in tickets if t.error is not None):
        raise type(error)(error.message, code=error.code, detail=error.detail)
