"""Files that are either the old or the new one, whatever happens: temporary name, fsync, rename, fsync of the directory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from refold.errors import StorageError

__all__ = ["discard", "sync_directory", "write_atomically"]


def discard(path: Path) -> None:
    """Removes a file that nobody needs any more, if it is there and can be removed. Raises no OSError: for error handlers."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, chunks: Iterable[bytes], *, mode: int = 0o644) -> None:
    """Writes `path` in one step. An error in `chunks` passes through and leaves nothing behind.

    Raises:
        StorageError: the disk is full, read-only or failing.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as f:
            for chunk in chunks:
                f.write(chunk)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as e:
        discard(temporary)
        raise StorageError(f"{path} cannot be written: {e.strerror or e}. Free some space or check the disk.") from e
    except BaseException:
        discard(temporary)
        raise
