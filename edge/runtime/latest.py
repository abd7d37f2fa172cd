"""The latest value of a function that may wait for a lock or a disk, for a caller that may not."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Latest"]

log = logging.getLogger(__name__)
T = TypeVar("T")


class Latest(Generic[T]):
    """Asks on a thread of its own. Thread-safe.

    Args:
        name: of the thread, and of what is asked in messages.
        ask: may take as long as it likes; when it raises, the value before stays.
        first: the value until `ask` has answered once.
    """

    def __init__(self, name: str, ask: Callable[[], T], first: T) -> None:
        self.name = name
        self._ask = ask
        self._value = first
        self._error = ""
        self._since: float | None = None  # when the question that is now being answered was put
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._answer, name=name, daemon=True)

    def get(self, wait: float = 0.2) -> T:
        """The present value, or the one before when the answer takes more than `wait` seconds."""
        with self._changed:
            if self._since is None and not self._closed:
                self._since = time.monotonic()
                if self._thread.ident is None:
                    self._thread.start()
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._since is None, wait)
            return self._value

    @property
    def waiting_s(self) -> float:
        """Seconds since the unanswered question was put; 0 when there is none."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def error(self) -> str:
        """Why the last answer failed, else empty."""
        return self._error

    def close(self) -> None:
        """Lets the thread end; does not wait for it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _answer(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._since is not None)
                if self._closed:
                    return
            try:
                value, error = self._ask(), ""
            except Exception as e:
                value, error = self._value, f"{self.name}: {type(e).__name__}: {e}"
                if error != self._error:
                    log.warning("%s", error, exc_info=e)
            with self._changed:
                self._value, self._error, self._since = value, error, None
                self._changed.notify_all()
