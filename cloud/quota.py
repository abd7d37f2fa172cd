"""Per-device shares: token buckets in calls and in bytes. Per device and not per address: a fleet sits behind one NAT."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

__all__ = ["Buckets"]

REMEMBERED = 100_000  # devices; beyond, the one unseen for longest starts afresh


class Buckets:
    """One bucket per key, full at first, refilled steadily up to `size` every `period_s` seconds.

    A bucket may be overdrawn by one charge, which lets a single large item through and delays the next.
    """

    def __init__(self, size: float, period_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.size, self._rate, self._clock = size, size / period_s, clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def _level(self, key: str, now: float) -> float:
        level, then = self._levels.get(key, (self.size, now))
        return min(self.size, level + (now - then) * self._rate)

    def room(self, key: str) -> float:
        """What may be taken now; 0 or less: nothing."""
        with self._lock:
            return self._level(key, self._clock())

    def take(self, key: str, amount: float) -> float:
        """Takes `amount` where anything is left; returns 0, or the seconds until something is when nothing was taken."""
        with self._lock:
            now = self._clock()
            level = self._level(key, now)
            if level <= 0:
                return (1e-9 - level) / self._rate
            self._levels[key] = (level - amount, now)
            self._levels.move_to_end(key)
            if len(self._levels) > REMEMBERED:
                self._levels.popitem(last=False)
            return 0.0

    def delay(self, key: str, amount: float) -> float:
        """Seconds until `amount` could be taken without an overdraft."""
        with self._lock:
            return max(0.0, (min(amount, self.size) - self._level(key, self._clock())) / self._rate)
