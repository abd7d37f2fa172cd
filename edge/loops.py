"""Threads that do one step after another: pauses that can be woken, failures that back off with jitter, a prompt stop."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from refold.errors import NetworkError, RefoldError

__all__ = ["Backoff", "BusyError", "Loop", "Pause"]

log = logging.getLogger(__name__)


class BusyError(NetworkError):
    """The other side asked for patience: no new try before `seconds` are over."""

    default_code = "busy"

    def __init__(self, message: str, seconds: float, *, detail: str = "") -> None:
        super().__init__(message, detail=detail)
        self.seconds = seconds


class Pause(NamedTuple):
    """What a step wants next: seconds to wait, and whether `Loop.wake` may end the wait."""

    seconds: float
    wakeable: bool = True


class Backoff:
    """Delays that double from `first` to `most`, each drawn from its upper half, so that a fleet does not return at once."""

    def __init__(self, first_s: float, most_s: float, rng: random.Random | None = None) -> None:
        self.first_s, self.most_s = first_s, most_s
        self._random = rng or random.Random()
        self._failures = 0

    def next(self) -> float:
        limit = min(self.first_s * 2.0 ** min(self._failures, 60), self.most_s)
        self._failures += 1
        return limit * self._random.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._failures = 0


class Loop:
    """One daemon thread around `step`.

    Args:
        name: of the thread.
        step: does a piece of work and says how long to pause. Raising backs off; nothing it raises ends the loop.
        backoff: of failures; reset by each step that returns.
        on_error: told of each failure, on this thread.
    """

    def __init__(
        self, name: str, step: Callable[[], Pause], backoff: Backoff, on_error: Callable[[str, RefoldError], None]
    ) -> None:
        self.name = name
        self._step, self._backoff, self._on_error = step, backoff, on_error
        self._condition = threading.Condition()
        self._ended = threading.Event()
        self._woken = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Ends a wakeable pause, or makes the next one empty. Never blocks."""
        with self._condition:
            self._woken = True
            self._condition.notify_all()

    def stop(self) -> None:
        with self._condition:
            self._ended.set()
            self._condition.notify_all()

    def join(self, seconds: float) -> bool:
        """True when the thread has ended."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def stopped(self) -> bool:
        return self._ended.is_set()

    def pause(self, seconds: float, *, wakeable: bool = False) -> None:
        """Waits; ended early by `stop`, and by `wake` when `wakeable`."""
        end = time.monotonic() + seconds
        with self._condition:
            while not self.stopped() and not (wakeable and self._woken):
                left = end - time.monotonic()
                if left <= 0:
                    break
                self._condition.wait(min(left, 3600.0))
            if wakeable:
                self._woken = False

    def _run(self) -> None:
        while not self.stopped():
            try:
                wanted = self._step()
                self._backoff.reset()
            except Exception as e:
                if self.stopped():
                    return
                error = e if isinstance(e, RefoldError) else RefoldError(f"{self.name} failed: {type(e).__name__}: {e}")
                if error is not e:
                    log.exception("%s failed", self.name)
                self._on_error(self.name, error)
                delay = self._backoff.next()
                wanted = Pause(max(delay, error.seconds) if isinstance(error, BusyError) else delay, wakeable=False)
            self.pause(wanted.seconds, wakeable=wanted.wakeable)
