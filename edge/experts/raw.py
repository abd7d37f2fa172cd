"""One aligned read of a file: with O_DIRECT, so that a budget is not eaten up by the page cache, or through the cache and out
of it.

A page cache keeps what it guesses; a pager knows. And inside a memory cgroup cached pages are charged to the reader, so that a
budget means what it says only where reads go past the cache. Some file systems refuse O_DIRECT (tmpfs on older kernels, some
overlays and network mounts): there the same reads run buffered, and the pages are dropped behind them with
posix_fadvise(DONTNEED).
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from pathlib import Path
from typing import Protocol

from refold.errors import StorageError
from refold.experts import ALIGNMENT

__all__ = ["RawFile", "RawReader"]

log = logging.getLogger(__name__)

O_DIRECT: int = getattr(os, "O_DIRECT", 0)
REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class RawReader(Protocol):
    """What the store reads through; a test gives one that fails, lies or dawdles."""

    direct: bool

    def read(self, into: memoryview, offset: int) -> int:
        """Fills the front of `into` from the file; bytes read, 0 at its end. Raises OSError. Called by several threads at
        once."""
        ...

    def close(self) -> None: ...


class RawFile:
    """A file opened for reading.

    Args:
        direct: False asks for buffered reads, without a warning.
        probe: an aligned offset to try O_DIRECT on; some file systems accept the flag and refuse the read.

    Attributes:
        direct: reads go past the page cache.

    Raises:
        StorageError: the file cannot be opened.
    """

    def __init__(self, path: Path, *, direct: bool = True, probe: int = 0) -> None:
        self.path = path
        self.direct = direct and O_DIRECT != 0 and self._permits(probe)
        if direct and not self.direct:
            log.warning(
                "%s lies on a file system without O_DIRECT: experts are read through the page cache and dropped from it again, "
                "which is slower and briefly takes more memory.",
                path,
            )
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (O_DIRECT if self.direct else 0))
        except OSError as e:
            raise StorageError(f"{path} cannot be opened: {e.strerror or e}.") from e

    def _permits(self, probe: int) -> bool:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | O_DIRECT)
        except OSError as e:
            if e.errno in REFUSED:
                return False
            raise StorageError(f"{self.path} cannot be opened: {e.strerror or e}.") from e
        try:
            with mmap.mmap(-1, max(ALIGNMENT, mmap.PAGESIZE)) as page, memoryview(page) as view:
                os.preadv(fd, [view], probe)
        except OSError as e:
            return e.errno not in REFUSED  # another error will come again, from a read that can name its record
        finally:
            os.close(fd)
        return True

    def read(self, into: memoryview, offset: int) -> int:
        n = os.preadv(self._fd, [into], offset)
        if not self.direct and n > 0:
            os.posix_fadvise(self._fd, offset, n, os.POSIX_FADV_DONTNEED)
        return n

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
