"""What the disk gives: reads of one record's size at random places, O_DIRECT, two threads, as a pager asks for them."""

from __future__ import annotations

import logging
import mmap
import os
import random
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

__all__ = ["READ_AHEAD", "direct", "evict", "rate", "read_ahead", "resident"]

log = logging.getLogger(__name__)
READ_AHEAD = 128  # KiB, Linux's default; with the 8 MiB of some servers a mapping reads its experts nine times


@contextmanager
def read_ahead(folder: Path, kib: int = READ_AHEAD, devices: Path = Path("/sys/class/bdi")) -> Iterator[int | None]:
    """Within, files opened on this folder's disk are read so far beyond a page that is not there; afterwards as far as before.

    Returns:
        KiB within: those asked for, or what the disk has where that may not be changed; None where it does not say.
    """
    number = folder.stat().st_dev
    told = devices / f"{os.major(number)}:{os.minor(number)}" / "read_ahead_kb"
    try:
        before = int(told.read_text())
    except (OSError, ValueError):
        yield None
        return
    try:
        told.write_text(str(kib))
    except OSError:
        yield before
        return
    try:
        yield kib
    finally:
        try:
            told.write_text(str(before))
        except OSError as e:
            log.warning("%s stays at %d KiB instead of %d: %s", told, kib, before, e)


def evict(path: Path) -> None:
    """Drops the file from the page cache, so that whoever wrote or read it last does not help whoever reads it next."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def resident(paths: Iterable[Path]) -> None:
    """Reads files into the page cache, charged to this process: libraries that a capped process were the first to touch would
    count against its cap, and lie under it only to be read again at every call."""
    for path in paths:
        with path.open("rb", buffering=0) as f:
            while f.read(1 << 20):
                pass


def direct(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether it passes the page cache by."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT), True
    except OSError:
        return os.open(path, os.O_RDONLY), False


def rate(path: Path, size: int, total: int = 256 << 20, threads: int = 2, seed: int = 0, most_seconds: float = 4.0) -> float:
    """Bytes per second over reads of `size` bytes (rounded up to 4 KiB) until `total` bytes or `most_seconds`."""
    size = -(-size // 4096) * 4096
    places = max(1, path.stat().st_size // size)
    each = max(1, total // size // threads)
    fd, _ = direct(path)
    until = time.perf_counter() + most_seconds

    def read(thread: int) -> int:
        draw, buffer, done = random.Random(seed * 1000 + thread), mmap.mmap(-1, size), 0
        with buffer:
            for _ in range(each):
                got = os.preadv(fd, [buffer], draw.randrange(places) * size)
                done += got
                if time.perf_counter() > until:
                    break
        return done

    try:
        started = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            done = sum(pool.map(read, range(threads)))
        return done / (time.perf_counter() - started)
    finally:
        os.close(fd)
