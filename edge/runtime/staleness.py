"""How old a status is, and whether its daemon still lives: pure functions of what the status says and of what is seen now.

A status carries two clocks. Within one boot its age is told by the kernel's since-boot clock, which no clock setting moves, and
many devices have no battery-backed clock; across a boot only the wall clock is left, and the daemon of then is gone anyway.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge.budget import SystemClock

__all__ = ["Staleness", "judge", "stamp"]

LEAST_S = 10.0  # a busy device may miss a few writes
MISSED = 3  # writes in a row


@dataclass(frozen=True)
class Staleness:
    """What is known of a status.

    Attributes:
        age_s: seconds since it was taken.
        running: a daemon holds the directory now.
        reason: empty: it can be believed. "died": no daemon runs, and this one did not say goodbye. "silent": a daemon runs and
            has not told anything new for too long.
        since_unix_ms: when it was taken.
    """

    age_s: float
    running: bool
    reason: str
    since_unix_ms: int

    def sentence(self) -> str:
        """For people; empty when there is nothing to say."""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since_unix_ms / 1000))
        if self.reason == "died":
            return f"Stale since {when}: no daemon runs here, and the last one ended without a word (killed, or a power cut)."
        if self.reason == "silent":
            return (
                f"Stale since {when} ({self.age_s:.0f} s): the daemon runs but can neither be asked nor write its status: "
                "look at its log and at the disk."
            )
        return ""


def stamp(every_s: float) -> dict[str, Any]:
    """What makes a status datable: both clocks, the process, and how often a new one is to be expected."""
    clock = SystemClock()
    return {
        "unix_ms": time.time_ns() // 1_000_000,
        "boot_id": clock.boot,
        "boot_s": round(clock.steady(), 3),
        "pid": os.getpid(),
        "every_s": every_s,
    }


def judge(
    status: Mapping[str, Any],
    *,
    held: bool | None,
    answered: bool,
    now_unix_ms: int,
    boot_id: str,
    boot_s: float,
    pid_exists: bool = False,
) -> Staleness:
    """Judges a status.

    Args:
        status: as written; one by an older version has no `boot_id` and is dated by the wall clock.
        held: whether a daemon holds the directory's lock; None: that cannot be found out, and the process is looked for.
        answered: it came from the daemon itself just now.
        now_unix_ms, boot_id, boot_s: the clocks.
        pid_exists: whether a process of the status's `pid` exists.
    """
    same_boot = bool(boot_id) and status.get("boot_id") == boot_id
    since = min(int(status.get("unix_ms", 0)), now_unix_ms)  # a wall clock that was ahead says nothing of the time since
    age = boot_s - float(status.get("boot_s", boot_s)) if same_boot else (now_unix_ms - since) / 1000
    age = max(age, 0.0)
    if same_boot:
        since = now_unix_ms - int(age * 1000)
    running = answered or (held if held is not None else bool(status.get("running")) and same_boot and pid_exists)
    if not running:
        return Staleness(age, False, "died" if status.get("running") else "", since)
    limit = max(LEAST_S, MISSED * float(status.get("every_s", 0.0)))
    late = age > limit or (not status.get("running") and age > LEAST_S)  # a new daemon that never wrote leaves the old farewell
    return Staleness(age, True, "silent" if late else "", since)
