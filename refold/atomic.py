"""Files that are either the old or the new one, whatever happens: temporary name, fsync, rename, fsync of the directory."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from refold.errors import StorageError

__all__ = ["make_directory", "sync_directory", "write_atomically", "write_new"]


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path, *, mode: int = 0o777) -> None:
    """Makes a directory and those missing above it, durably: a file synced into one that a power cut forgets would be lost.

    Args:
        mode: of the last one, as in `Path.mkdir`; one that is there keeps its own.

    Raises:
        OSError: it cannot be made, or a file has its name.
    """
    missing = [d for d in (directory, *directory.parents) if not d.is_dir()]
    directory.mkdir(parents=True, exist_ok=True, mode=mode)
    for made in missing:
        sync_directory(made.parent)


def write_new(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Writes a file that must not be there yet, durably; what an error leaves half written is removed.

    Raises:
        FileExistsError: it is there, and stays as it was.
        StorageError: the disk is full, read-only or failing.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise
    except OSError as e:
        raise StorageError(f"{path} cannot be written: {e.strerror or e}.") from e
    try:
        with os.fdopen(descriptor, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        sync_directory(path.parent)
    except OSError as e:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written: {e.strerror or e}. Free some space or check the disk.") from e


def write_atomically(path: Path, chunks: Iterable[bytes], *, mode: int = 0o644) -> None:
    """Writes `path` in one step. An error in `chunks` passes through and leaves nothing behind.

    Raises:
        StorageError: the disk is full, read-only or failing.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
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
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written: {e.strerror or e}. Free some space or check the disk.") from e
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
