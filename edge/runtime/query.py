"""`refold edge status`: asks the daemon, else reads what it wrote, and says how much of that can still be believed."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from edge.budget import SystemClock
from edge.directory import DataDirectory
from edge.runtime.staleness import Staleness, judge
from edge.runtime.status_socket import ask
from refold.errors import InputError, StorageError, UsageError
from refold.imaging import open_regular

__all__ = ["find_status"]


def find_status(data: Path) -> tuple[dict[str, Any], Staleness]:
    """The status of the daemon on a data directory, with `running`, `age_s`, `stale` and `stale_since_unix_ms` filled in.

    Raises:
        UsageError: no daemon has run there, or the file cannot be read and none answers.
    """
    directory = DataDirectory(data)
    answered = ask(data)
    told = answered if answered is not None else _read(directory)
    clock = SystemClock()
    staleness = judge(
        told,
        held=_held(directory) if answered is None else True,
        answered=answered is not None,
        now_unix_ms=time.time_ns() // 1_000_000,
        boot_id=clock.boot,
        boot_s=clock.steady(),
        pid_exists=_exists(int(told.get("pid", 0))),
    )
    told |= {
        "running": staleness.running,
        "age_s": round(staleness.age_s, 1),
        "stale": staleness.reason,
        "stale_since_unix_ms": staleness.since_unix_ms if staleness.reason else None,
    }
    return told, staleness


def _read(directory: DataDirectory) -> dict[str, Any]:
    try:
        with open_regular(directory.status) as f:
            told = json.loads(f.read())
        if not isinstance(told, dict) or not _dated(told):
            raise ValueError("it is no status that a daemon wrote")
    except InputError as e:
        if directory.status.exists() or directory.status.is_symlink():
            raise UsageError(f"{directory.status} {e.message}", code="no-status") from e
        if _held(directory):
            raise UsageError(
                f"A daemon runs on {directory.root.absolute()}, but it does not answer and has not written a status: "
                "look at its log and at the disk.",
                code="no-status",
            ) from None
        raise UsageError(f"No daemon has run on {directory.root.absolute()} yet.", code="no-status") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UsageError(f"{directory.status} cannot be read: {e}.", code="no-status") from e
    return told


def _dated(told: dict[str, Any]) -> bool:
    """Whether the numbers that say how old a status is are numbers."""
    kinds = {"unix_ms": True, "boot_s": False, "every_s": False, "pid": False}
    return all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        for name, needed in kinds.items()
        if (value := told.get(name)) is not None or needed
    )


def _held(directory: DataDirectory) -> bool | None:
    try:
        return directory.locked_by_another
    except StorageError:
        return None


def _exists(pid: int) -> bool:
    return pid > 0 and Path(f"/proc/{pid}").exists()
