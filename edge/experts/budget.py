"""How many bytes experts may take: what the user says, or what the machine and its memory cgroup leave free.

    choose("512MB")     that
    choose("auto")      the least of MemAvailable and of what each memory cgroup above this process still permits, less a
    reserve resolve(n, model)   the bytes for a bundle, given as a number or "auto"

Version 1 and version 2 cgroups are read, from the process's own up to the root, as a container's limit often sits above its
group. Cached file pages that a group is charged with are the kernel's to drop, so they count as free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edge.experts.cache import memory_sizes
from refold.errors import UsageError
from refold.experts import ExpertIndex
from refold.sizes import parse_size

__all__ = ["Budget", "Room", "available", "choose", "resolve"]

RESERVE_SHARE, RESERVE_LEAST = 0.1, 64 * 2**20  # for activations, key-value cache and whoever else lives here
UNLIMITED = 2**60  # version 1 writes "no limit" as a number near 2**63


@dataclass(frozen=True)
class Room:
    """One bound on memory. free: bytes; limit: None for MemAvailable."""

    source: str
    free: int
    limit: int | None = None


@dataclass(frozen=True)
class Budget:
    """Bytes for expert records. why: a sentence for people."""

    bytes: int
    why: str


def choose(text: str, resident: int = 0, root: Path = Path("/")) -> Budget:
    """Bytes for experts.

    Args:
        text: a size, or "auto".
        resident: bytes that the rest of the model takes or will yet take, which "auto" leaves free.
        root: of /proc and /sys; a test's.

    Raises:
        UsageError: no size, nothing known of memory, or nothing left.
    """
    if text.strip().lower() != "auto":
        size = parse_size(text)
        return Budget(size, f"{_mb(size)} for experts, as asked.")
    rooms = available(root)
    if not rooms:
        raise UsageError("This system does not tell how much memory is free: give --memory, as in 512MB.", code="budget")
    least = min(rooms, key=lambda r: r.free)
    reserve = max(int(least.free * RESERVE_SHARE), RESERVE_LEAST)
    size = least.free - reserve - resident
    told = f"{least.source} leaves {_mb(least.free)}" + (f" of {_mb(least.limit)}" if least.limit is not None else "")
    rest = f"{_mb(reserve)} are kept in reserve" + (f" and {_mb(resident)} are for the rest of the model" if resident else "")
    if size <= 0:
        raise UsageError(f"No memory is left for experts: {told}, of which {rest}.", code="budget")
    return Budget(size, f"{_mb(size)} for experts: {told}, of which {rest}.")


class Resident(Protocol):
    """What is asked of a PagedModel."""

    @property
    def index(self) -> ExpertIndex: ...
    def resident_places(self) -> Mapping[str, Any]: ...


def resolve(memory: int | str, model: Resident, halves: bool = False) -> int:
    """Bytes for the experts of a bundle that is about to be loaded; "auto" leaves room for its other weights and takes no more
    than all experts need.

    Args:
        halves: 16-bit matrices stay in 16 bits, everything else is float32.

    Raises:
        As `choose`.
    """
    if isinstance(memory, int):
        return memory
    resident = sum(
        (2 if halves and dtype in ("F16", "BF16") and len(shape) == 2 else 4) * math.prod(shape)
        for dtype, shape, *_ in model.resident_places().values()
    )
    size = choose(memory, resident).bytes
    return min(size, int(memory_sizes(model.index).sum())) if memory.strip().lower() == "auto" else size


def available(root: Path = Path("/")) -> list[Room]:
    """Every bound there is."""
    out = []
    meminfo = _fields(root / "proc/meminfo")
    if "MemAvailable:" in meminfo:
        out.append(Room("the machine", meminfo["MemAvailable:"] * 1024))
    for group in _groups(root):
        room = _v2(group) or _v1(group)
        if room is not None:
            out.append(room)
    return out


def _groups(root: Path) -> list[Path]:
    """Folders of the memory cgroups of this process and of those above, as seen from inside or outside of a container."""
    out = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "memory" in controllers.split(","):
            mounts = [root / "sys/fs/cgroup/memory"]
        else:
            continue
        for mount in mounts:
            folder = mount / path.lstrip("/")
            while folder != mount:
                out.append(folder)
                folder = folder.parent
            out.append(mount)  # inside a container the group's own path may not be there, and the mount is the group
    return [folder for folder in out if folder.is_dir()]


def _v2(group: Path) -> Room | None:
    limits = [n for n in (_number(group / "memory.max"), _number(group / "memory.high")) if n is not None]
    usage = _number(group / "memory.current")
    if not limits or usage is None:
        return None
    cached = _fields(group / "memory.stat").get("inactive_file", 0)
    return Room(f"cgroup {group.name or '/'}", max(min(limits) - usage + cached, 0), min(limits))


def _v1(group: Path) -> Room | None:
    limit, usage = _number(group / "memory.limit_in_bytes"), _number(group / "memory.usage_in_bytes")
    if limit is None or usage is None or limit >= UNLIMITED:
        return None
    cached = _fields(group / "memory.stat").get("total_inactive_file", 0)
    return Room(f"cgroup {group.name or '/'}", max(limit - usage + cached, 0), limit)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _fields(path: Path) -> dict[str, int]:
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}


def _mb(size: int) -> str:
    return f"{size / 10**6:,.0f} MB"
