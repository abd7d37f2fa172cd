"""Who may generate: one at a time, first come, first served, a limited number waiting.

One at a time, because two texts at once would share one cache and one core: both would be slower than one after the other.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Full", "Gone", "Turns"]

LOOK_S = 0.1  # how often a waiting request looks whether its client is still there


class Full(Exception):  # noqa: N818 - an answer, not a failure
    """Too many wait already."""


class Gone(Exception):  # noqa: N818
    """The client left while it waited."""


class Turns:
    """Thread-safe. Args: `waiting`: requests that may wait; one more is refused."""

    def __init__(self, waiting: int) -> None:
        self._limit = waiting
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def length(self) -> int:
        """The one whose turn it is and those who wait."""
        return len(self._queue)

    @contextmanager
    def mine(self, gone: Callable[[], bool]) -> Iterator[None]:
        """Waits for its turn and has it inside the block.

        Raises:
            Full: at once. Gone: `gone()` became true while waiting.
        """
        ticket = object()
        with self._changed:
            if len(self._queue) > self._limit:
                raise Full
            self._queue.append(ticket)
        try:
            with self._changed:
                while self._queue[0] is not ticket:
                    self._changed.wait(LOOK_S)
                    if gone():
                        raise Gone
            yield
        finally:
            with self._changed:
                self._queue.remove(ticket)
                self._changed.notify_all()
