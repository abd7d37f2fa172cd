"""Records from disk: reader threads that take one block at a time, demand before read-ahead.

    store.submit(record, memory, demand=True)   a Ticket; `memory` is filled when `ticket.done`
    store.promote(ticket)                       read-ahead that is now asked for
    store.cancel(ticket)                        no further block begins; done once those in flight have ended

A block is what a demand read waits for at most when read-ahead is under way (MoE-Infinity's two queues); two threads on blocks
of 512 KiB reach the plateau of most flash. Everything but the read itself and the digest happens under the one lock that the
store shares with the pager, so that `finished` can put a record into the cache before anybody sees its ticket done.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge.experts.raw import RawReader
from refold.errors import BundleError, RefoldError, StorageError
from refold.experts import ALIGNMENT, Record

__all__ = ["Disk", "RecordStore", "Ticket", "Verify"]

Verify = Literal["first", "always", "never"]


@dataclass(eq=False)
class Ticket:
    """One record on its way. Guarded by the store's lock.

    Attributes:
        demand: somebody waits for it. done: nothing will happen any more: read and verified, cancelled, or failed with `error`.
        read: bytes that came so far.
    """

    record: Record
    memory: NDArray[np.uint8]
    demand: bool
    done: bool = False
    cancelled: bool = False
    error: RefoldError | None = None
    begun: int = 0
    flying: int = 0
    read: int = 0

    @property
    def ready(self) -> bool:
        return self.done and self.error is None and not self.cancelled

    @property
    def waiting(self) -> bool:
        """Blocks are left to begin."""
        return not self.cancelled and self.error is None and self.begun < self.record.size


@dataclass
class Disk:
    """What came from the disk: bytes by who asked, seconds in which at least one read was under way, records read a second
    time."""

    demand_bytes: int = 0
    ahead_bytes: int = 0
    busy_seconds: float = 0.0
    reads: int = 0
    again: int = 0

    @property
    def rate(self) -> float:
        """Bytes per second while busy; 0 before the first read."""
        return (self.demand_bytes + self.ahead_bytes) / self.busy_seconds if self.busy_seconds > 0 else 0.0


class RecordStore:
    """Reads records of one file.

    Args:
        raw: what reads. name: of the file, for messages. base: offset of records.bin within it.
        lock: shared with the caller, who holds it for every method but `close`.
        finished: called under the lock when a ticket is done, by a reader or by `cancel`.
        threads: readers. block: bytes of one read, a multiple of 4,096.
        verify: digests are checked at a record's first read, at every read, or never.
    """

    def __init__(
        self,
        raw: RawReader,
        name: str,
        base: int,
        lock: threading.RLock,
        finished: Callable[[Ticket], None],
        *,
        threads: int = 2,
        block: int = 512 * 1024,
        verify: Verify = "first",
    ) -> None:
        self.name, self.disk = name, Disk()
        self._raw, self._base, self._block, self._verify = raw, base, block, verify
        self._finished = finished
        self._work = threading.Condition(lock)
        self._demand: deque[Ticket] = deque()
        self._ahead: deque[Ticket] = deque()
        self._verified: set[tuple[int, int]] = set()
        self._flying, self._since, self._closing = 0, 0.0, False
        self._open = 0
        self._threads = [threading.Thread(target=self._run, name=f"expert-reader-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, record: Record, memory: NDArray[np.uint8], *, demand: bool) -> Ticket:
        ticket = Ticket(record, memory, demand)
        self._open += 1
        (self._demand if demand else self._ahead).append(ticket)
        self._work.notify_all()
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """Moves read-ahead to the end of the demand queue."""
        if not ticket.demand and not ticket.done:
            ticket.demand = True
            if ticket in self._ahead:
                self._ahead.remove(ticket)
                self._demand.append(ticket)
                self._work.notify_all()

    def cancel(self, ticket: Ticket) -> None:
        """Read-ahead that nobody asks for. One whose blocks have all begun is left to end."""
        if ticket.done or ticket.demand or not ticket.waiting:
            return
        ticket.cancelled = True
        if ticket in self._ahead:
            self._ahead.remove(ticket)
        if not ticket.flying:
            self._end(ticket)

    @property
    def idle(self) -> bool:
        """Every ticket is done, its digest checked."""
        with self._work:
            return not self._open

    def _end(self, ticket: Ticket) -> None:
        ticket.done = True
        self._open -= 1
        self._finished(ticket)

    def _run(self) -> None:
        with self._work:
            while True:
                while not self._closing and not self._demand and not self._ahead:
                    self._work.wait()
                if self._closing:
                    return
                queue = self._demand or self._ahead
                ticket = queue[0]
                start, ticket.begun = ticket.begun, min(ticket.begun + self._block, ticket.record.size)
                if not ticket.waiting:
                    queue.popleft()
                self._one(ticket, start, ticket.begun)

    def _one(self, ticket: Ticket, start: int, end: int) -> None:
        """One block, and after a record's last block its digest. Called with the lock held, lets go of it meanwhile."""
        ticket.flying += 1
        self._busy(+1)
        lock = self._work
        error: RefoldError | None = None
        lock.release()
        try:
            self._read(ticket, start, end)
        except RefoldError as e:
            error = e
        except Exception as e:  # whatever a reader thread meets must reach the one who waits
            error = StorageError(f"{self._what(ticket)} could not be read: {e}.", detail=repr(e))
        finally:
            lock.acquire()
        self._busy(-1)
        if error is None:
            ticket.read += end - start
            if ticket.demand:
                self.disk.demand_bytes += end - start
            else:
                self.disk.ahead_bytes += end - start
        elif ticket.error is None:
            ticket.error = error
            for queue in (self._demand, self._ahead):
                if ticket in queue:
                    queue.remove(ticket)
        if ticket.error is None and ticket.read == ticket.record.size:
            ticket.error = self._check(ticket)
            self.disk.reads += 1
        ticket.flying -= 1
        if not ticket.flying and not ticket.waiting and not ticket.done:
            self._end(ticket)

    def _busy(self, change: int) -> None:
        now = time.perf_counter()
        if self._flying:
            self.disk.busy_seconds += now - self._since
        self._flying, self._since = self._flying + change, now

    def _read(self, ticket: Ticket, start: int, end: int) -> None:
        view = memoryview(ticket.memory)  # type: ignore[arg-type]
        at = start
        try:
            while at < end:
                n = self._raw.read(view[at:end], self._base + ticket.record.offset + at)
                n -= n % ALIGNMENT if n < end - at else 0
                if n <= 0:
                    raise StorageError(
                        f"{self._what(ticket)} ends early, at byte {ticket.record.offset + at} of its records: the file was "
                        "truncated or the disk is gone. Copy the model again.",
                        code="storage",
                    )
                at += n
        except OSError as e:
            raise StorageError(
                f"{self._what(ticket)} cannot be read: {e.strerror or e}. Check the disk.", detail=f"errno {e.errno}"
            ) from e

    def _check(self, ticket: Ticket) -> RefoldError | None:
        """The digest, outside the lock; a second read from the start before it is believed that the file is damaged."""
        key = (ticket.record.layer, ticket.record.expert)
        if self._verify == "never" or (self._verify == "first" and key in self._verified):
            return None
        lock = self._work
        error: RefoldError | None = None
        lock.release()
        try:
            again = not self._matches(ticket)
            if again:
                self._read(ticket, 0, ticket.record.size)
                if not self._matches(ticket):
                    error = BundleError(
                        f"{self._what(ticket)} is damaged: its bytes do not match their digest, twice. Copy the model again.",
                        code="digest",
                    )
        except RefoldError as e:
            again, error = True, e
        finally:
            lock.acquire()
        self.disk.again += again
        if error is None:
            self._verified.add(key)
        return error

    @staticmethod
    def _matches(ticket: Ticket) -> bool:
        return hashlib.sha256(memoryview(ticket.memory)).hexdigest() == ticket.record.sha256  # type: ignore[arg-type]

    def _what(self, ticket: Ticket) -> str:
        return f"Expert {ticket.record.expert} of layer {ticket.record.layer} in {os.fspath(self.name)}"

    def close(self) -> None:
        """Ends the readers once their block is read, then closes the file. Tickets not done stay so."""
        with self._work:
            self._closing = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join()
        self._raw.close()
