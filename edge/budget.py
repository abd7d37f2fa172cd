"""How many bytes may go up per hour, remembered across restarts and deaf to clock jumps.

    budget = ByteBudget(bytes_per_hour, outbox)     None: unlimited; 0: nothing goes up
    budget.spend(n) -> bool                         before sending; False: not now, nothing was counted
    budget.charge(n)                                what must go anyway (heartbeats, polls): counted, never refused
    budget.available() -> int | None                None: unlimited
    budget.seconds_until(n) -> float                inf: never

Bytes are counted per minute and summed over 61 minutes, so that no sliding hour whatever carries more than the budget. Time is
the kernel's since-boot clock, carried across restarts of the daemon by the boot's id; across a reboot it is the wall clock,
and a wall clock that went backwards counts as no time at all.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Protocol

from edge.outbox import Outbox

__all__ = ["ByteBudget", "Clock", "SystemClock"]

MINUTES = 60  # looked back beyond the current minute
BOOT_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", None)
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Clock(Protocol):
    """Three readings; a test's clock moves by hand.

    Attributes:
        boot: names the time line of `steady`; empty when it ends with the process.
    """

    boot: str

    def steady(self) -> float:
        """Seconds that never jump, within one boot."""
        ...

    def wall(self) -> float:
        """Unix seconds, which may jump."""
        ...


class SystemClock:
    """Time since boot, suspended time included, where the kernel tells it."""

    def __init__(self) -> None:
        self.boot = BOOT_ID.read_text().strip() if BOOT_ID.is_file() else ""

    def steady(self) -> float:
        return time.clock_gettime(BOOT_CLOCK) if BOOT_CLOCK is not None else time.monotonic()

    def wall(self) -> float:
        return time.time()


class ByteBudget:
    """A sliding hour in the outbox's file, read when first asked. Thread-safe. Each method may raise StorageError.

    Args:
        bytes_per_hour: None for no limit, 0 for nothing.
        outbox: whose file keeps the count.
    """

    def __init__(self, bytes_per_hour: int | None, outbox: Outbox, clock: Clock | None = None) -> None:
        self.bytes_per_hour = bytes_per_hour
        self._database = outbox.database
        self._clock = clock or SystemClock()
        self._resumed: tuple[float, float] | None = None  # seconds counted before, and the clock when they were read

    def _resume(self) -> float:
        for seconds, wall, boot, steady in self._database.rows("SELECT seconds, wall, boot, steady FROM clock"):
            same_boot = bool(boot) and boot == self._clock.boot
            elapsed = self._clock.steady() - steady if same_boot else self._clock.wall() - wall
            return float(seconds) + max(float(elapsed), 0.0)
        return 0.0

    def _now(self) -> float:
        """Raises StorageError while what was counted before the start cannot be read: nothing may be sent on a guess."""
        if self._resumed is None:
            self._resumed = (self._resume(), self._clock.steady())
        base, start = self._resumed
        return base + max(self._clock.steady() - start, 0.0)

    def spent(self) -> int:
        """Bytes counted in the last hour."""
        first = int(self._now() // 60) - MINUTES
        return int(self._database.rows("SELECT COALESCE(SUM(bytes), 0) FROM spent WHERE minute >= ?", (first,))[0][0])

    def available(self) -> int | None:
        if self.bytes_per_hour is None:
            return None
        return max(self.bytes_per_hour - self.spent(), 0)

    def spend(self, n: int) -> bool:
        """Counts `n` bytes when the hour still holds them. Raises StorageError: nothing counted, so do not send."""
        return self._count(n, self.bytes_per_hour)

    def charge(self, n: int) -> None:
        """Counts `n` bytes even beyond the budget; later `spend`s wait for them."""
        self._count(n, None)

    def _count(self, n: int, limit: int | None) -> bool:
        now = self._now()
        minute = int(now // 60)
        with self._database.transaction() as t:
            t.execute("DELETE FROM spent WHERE minute < ?", (minute - MINUTES,))
            if limit is not None and t.execute("SELECT COALESCE(SUM(bytes), 0) FROM spent").fetchone()[0] + n > limit:
                return False
            t.execute(
                "INSERT INTO spent VALUES (?, ?) ON CONFLICT (minute) DO UPDATE SET bytes = bytes + excluded.bytes", (minute, n)
            )
            t.execute(
                "INSERT OR REPLACE INTO clock VALUES (1, ?, ?, ?, ?)",
                (now, self._clock.wall(), self._clock.boot, self._clock.steady()),
            )
        return True

    def seconds_until(self, n: int) -> float:
        """How long until `spend(n)` would succeed if nothing else were sent; inf when the whole hour is too small."""
        if self.bytes_per_hour is None:
            return 0.0
        if n > self.bytes_per_hour:
            return math.inf
        now = self._now()
        first = int(now // 60) - MINUTES
        over = self.spent() + n - self.bytes_per_hour
        rows = self._database.rows("SELECT minute, bytes FROM spent WHERE minute >= ? ORDER BY minute", (first,))
        for minute, size in rows:
            if over <= 0:
                break
            over -= size
            if over <= 0:
                return float(max((minute + MINUTES + 1) * 60.0 - now, 0.0))
        return 0.0
