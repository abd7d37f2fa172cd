"""Ctrl-C where it does no harm.

Python raises KeyboardInterrupt between any two lines, also between a pager's books and the read that they speak of; its reader
thread then meets a record that nobody has. Here the first Ctrl-C is only noted, and whoever computes looks before every expert.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from refold.errors import RefoldError

__all__ = ["Interrupt"]


class Interrupt:
    """In a `with` of the main thread: `is_set()` after the first Ctrl-C, the second is Python's own. What the first one ended
    leaves as KeyboardInterrupt."""

    def __init__(self) -> None:
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def check(self) -> None:
        """Raises KeyboardInterrupt after Ctrl-C."""
        if self._set:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._set = True
        signal.signal(signal.SIGINT, self._before)

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.signal(signal.SIGINT, self._before)
        if error is not None and not isinstance(error, RefoldError):
            self.check()
