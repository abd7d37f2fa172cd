"""The folder a demo run keeps its files in: emptied at the start, locked while it runs, left behind to be looked at."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from refold.errors import StorageError, UsageError

__all__ = ["LEAST_FREE_BYTES", "workplace"]

MARKER = ".refold-demo"
LEAST_FREE_BYTES = 200 * 1024**2  # bundle, store, outbox and logs stay below 60 MB


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """Yields `folder`, absolute and empty but for the lock.

    Raises:
        UsageError: another demo runs in it, or it holds files that no demo made.
        StorageError: it cannot be made or emptied, or the disk is nearly full.
    """
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker = folder / MARKER
        if not marker.exists() and any(folder.iterdir()):
            raise UsageError(f"{folder} holds files that are not the demo's; give another folder with --work.")
        free = shutil.disk_usage(folder).free
        if free < LEAST_FREE_BYTES:
            raise StorageError(
                f"{folder} has {free >> 20} MiB free and the demo needs {LEAST_FREE_BYTES >> 20}: free some, or use --work."
            )
        descriptor = os.open(marker, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as e:
        raise StorageError(f"{folder} cannot be used: {e.strerror or e}. Give another folder with --work.") from e
    try:
        _lock(descriptor, folder)
        _empty(folder)
        yield folder
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows: two demos at once are then the user's care
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        raise UsageError(f"Another demo is running in {folder}: wait for it, or give another folder with --work.") from e


def _empty(folder: Path) -> None:
    try:
        for path in folder.iterdir():
            if path.name == MARKER:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as e:
        raise StorageError(f"{folder} cannot be emptied: {e.strerror or e}.") from e
