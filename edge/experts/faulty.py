"""A reader of records from memory that can fail, dawdle, lie and end early: the double that the store's and pager's tests read
through."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable

__all__ = ["FaultyFile"]


class FaultyFile:
    """Bytes that answer like a file, and every read of which is written down.

    Args:
        content: of the whole file.

    Attributes:
        flip: offsets of bytes whose lowest bit is turned; `flips_left` says in how many reads (None: in all).
        fail: errno by offset of a byte: a read that touches it raises; `failures_left` says how often (None: always).
        delay: seconds that every read takes.
        gate: a read waits until this is set; a test clears it to hold reads up.
        before: called with the offset ahead of every read.
        reads: (offset, length) in the order in which reads began.
    """

    direct = True

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.flip: set[int] = set()
        self.flips_left: int | None = None
        self.fail: dict[int, int] = {}
        self.failures_left: int | None = None
        self.delay = 0.0
        self.gate = threading.Event()
        self.gate.set()
        self.before: Callable[[int], None] | None = None
        self.reads: list[tuple[int, int]] = []
        self.closed = False
        self._lock = threading.Lock()

    def read(self, into: memoryview, offset: int) -> int:
        with self._lock:
            self.reads.append((offset, len(into)))
        if self.before is not None:
            self.before(offset)
        self.gate.wait()
        if self.delay:
            time.sleep(self.delay)
        if self.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        end = min(offset + len(into), len(self.content))
        with self._lock:
            for at, number in self.fail.items():
                if offset <= at < offset + len(into) and self.failures_left != 0:
                    if self.failures_left is not None:
                        self.failures_left -= 1
                    raise OSError(number, os.strerror(number))
            n = max(end - offset, 0)
            into[:n] = self.content[offset:end]
            for at in self.flip:
                if offset <= at < end and self.flips_left != 0:
                    if self.flips_left is not None:
                        self.flips_left -= 1
                    into[at - offset] ^= 1
        return n

    def close(self) -> None:
        self.closed = True
