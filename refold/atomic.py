"""Files that are either the old or the new one, whatever happens: temporary name, fsync, rename, fsync of the directory."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from refold.errors import StorageError, UsageError

__all__ = ["check_output", "discard", "make_directory", "sync_directory", "write_atomically", "write_new"]

PROBE_BYTES = 4096  # a block: an empty file can be made on a full disk


def check_output(path: Path) -> None:
    """Finds out before long work whether its result can be written to `path`; leaves nothing and touches no file that is there.

    Raises:
        UsageError: the path is a directory or a device, or lies in no directory.
        StorageError: the disk is full or read-only, or the directory is not this user's to write.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a directory: give the name of a file to write.")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is a device or a pipe: a result is renamed into place and would replace it. Give a file.")
    if not path.parent.is_dir():
        raise UsageError(f"There is no directory {path.parent} to write {path.name} into.")
    probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
    try:
        with probe.open("wb", buffering=0) as f:
            f.write(bytes(PROBE_BYTES))
    except OSError as e:
        raise _not_written(path, e) from e
    finally:
        discard(probe)


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
        discard(temporary)
        raise _not_written(path, e) from e
    except BaseException:
        discard(temporary)
        raise


def write_new(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Writes a file that must not be there yet, durably. An error leaves no half of it in the way of the next try.

    Raises:
        FileExistsError: it is there; nothing was changed.
        StorageError: the disk is full, read-only or failing.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise
    except OSError as e:
        raise _not_written(path, e) from e
    try:
        with os.fdopen(descriptor, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        sync_directory(path.parent)
    except OSError as e:
        discard(path)
        raise _not_written(path, e) from e
    except BaseException:
        discard(path)
        raise


def _not_written(path: Path, e: OSError) -> StorageError:
    return StorageError(f"{path} cannot be written: {e.strerror or e}. Free some space or check the disk.")
