"""Experts in a byte budget: whoever computes asks for a layer's experts and gets their records, from memory or from the disk.

    with Pager.open(model, budget) as pager:
        with pager.use(layer, experts) as records:       uint8 arrays in the order asked, pinned inside the block
            ...
        pager.hint(layer + 1, likely, confidence)        read-ahead that no demand read ever waits for
        for experts, records in pager.waves(layer, union): ...   however many: those in memory first, the rest as they come
        pager.token()                                    the token has ended

Here: what is counted, guessed and learnt. How records come and go is in memory.py. Records are valid only inside their block:
the buffer is reused.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge.experts.counters import Counters, TokenRecord
from edge.experts.memory import U8, Holds, Memory
from edge.experts.paths import PathTable
from edge.experts.policies import I64
from edge.experts.predict import ReadAhead
from edge.experts.raw import RawReader
from edge.experts.settings import PagerSettings
from edge.experts.trace import TraceWriter
from refold.errors import UsageError
from refold.experts import ExpertIndex

__all__ = ["Paged", "Pager", "PagerSettings"]

HISTORY = 512  # tokens whose numbers are kept: a longer one is memory that grows for hours


class Paged(Protocol):
    """What `refold.experts.paged.PagedModel` tells a pager."""

    @property
    def path(self) -> Path: ...
    @property
    def index(self) -> ExpertIndex: ...
    @property
    def records_at(self) -> int: ...


class Pager(Memory):
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
        self.settings = s = settings or PagerSettings()
        super().__init__(path, index, records_at, budget, s, raw)
        g = index.geometry
        self._path_lock = threading.Lock()
        self._token, self._position = 0, -1
        self._hits = self._covered = self._late = self._misses = self._useful = 0
        self._mark = (0, 0, 0, 0.0)
        self.history: deque[TokenRecord] = deque(maxlen=HISTORY)
        self._trace: TraceWriter | None = None
        self.paths = PathTable.load(s.paths_file(path), index, order=s.path_order) if s.ahead else None
        pinned = int(self.cache.sizes[self.cache.pinned].sum())
        limit = max(min(int(budget * s.ahead_share), budget - self.floor - pinned), 0)
        self.ahead = ReadAhead(self.layout, g.top_k, limit, s.threshold)
        self._pending: dict[int, set[int]] = {}  # by position: numbers read ahead and not yet asked for
        if s.warm:
            with self._lock:
                self._warm()

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
        holds = Holds()
        with self._lock:
            position, ids = self._ask(layer, experts)
            unique = list(dict.fromkeys(ids))
            room = self.budget - int(self.cache.sizes[self.cache.pinned].sum())
            if sum(int(self.cache.sizes[i]) for i in unique if not self.cache.pinned[i]) > room:
                raise UsageError(
                    f"{len(unique)} experts of layer {layer} are more than {self.budget:,} bytes hold at once: ask in waves.",
                    code="budget",
                )
            begin = time.perf_counter()
            self._settle(position, unique)
            try:
                self._clear(unique, position)
                for i in unique:
                    while not self._begin(i, position, unique, holds):
                        self._pause(holds)
            except BaseException:
                self._release(holds)
                raise
        try:
            guess = self._learn(position, unique)  # while the disk is at work
            with self._lock:
                self._follow(guess)
                self._await(holds, begin)
                records = [self._entries[i].slot.memory for i in ids]
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
        loading, held = Holds(), Holds()
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
                wave = self._wave(held)
            guess = self._learn(position, list(dict.fromkeys(ids)))
            with self._lock:
                self._follow(guess)
            if wave[0]:
                yield wave
            while left or loading.tickets:
                with self._lock:
                    self._release(held)
                    begin = time.perf_counter()
                    self._stream(left, loading, position, window, wait=True)
                    self._await(loading, begin, 1)
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
            with self._path_lock:
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
        if self._trace is not None:
            self._trace.layer(position, [i - position * count for i in ids])

    def _learn(self, position: int, ids: list[int]) -> tuple[int, I64, NDArray[np.float64]] | None:
        """Teaches the path table, outside the lock, and asks it for the next layer where the model gives no hints."""
        if self.paths is None:
            return None
        with self._path_lock:
            self.paths.learn(position, np.array(ids, np.int64) - position * self.layout.experts)
            following = self.ahead.following(position)
            if self.ahead.hints_come(following, self._token):
                return None
            guess = self.paths.predict(following)
        return None if guess is None else (following, *guess)

    def _follow(self, guess: tuple[int, I64, NDArray[np.float64]] | None) -> None:
        if guess is not None:
            following, experts, confidence = guess
            ids = (experts + following * self.layout.experts).tolist()
            self._read_ahead(following, ids, self.ahead.choose(following, ids, confidence.tolist()))

    def _read_ahead(self, position: int, ids: list[int], chosen: list[int]) -> None:
        target = self._token if position > self._position else self._token + 1
        soon, sizes, count = self.cache.soon, self.cache.sizes, self.layout.experts
        soon[position * count : (position + 1) * count] = False
        soon[chosen] = True
        flying = int(sizes[self.cache.coming].sum())
        wanted = []
        for i in chosen:
            if i not in self._entries and flying + int(sizes[i]) <= self.ahead.limit:
                wanted.append(i)
                flying += int(sizes[i])
        if not wanted:
            return
        now, keep = max(self._position, 0), np.flatnonzero(soon).tolist()
        self._clear(wanted, now, keep)
        for i in wanted:
            if not self._take(i, now, keep, demand=False):
                return
            self._entries[i].ahead_for = target
            self._pending.setdefault(position, set()).add(i)
