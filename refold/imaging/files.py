"""Opening a file that somebody put into a folder: only a regular one, and never waiting for it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from refold.errors import InputError

__all__ = ["SUFFIXES", "is_image_name", "kind_of", "open_regular"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})
KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return Path(name).suffix.lower() in SUFFIXES


def kind_of(mode: int) -> str:
    """What a file is that is no regular one, in words; empty for a regular file."""
    if stat.S_ISREG(mode):
        return ""
    return next((name for fits, name in KINDS if fits(mode)), "no regular file")


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading, through symbolic links.

    A named pipe without a writer would keep `open` waiting for ever, so the kind is asked first, and once more of what was
    opened in case it was exchanged in between (open(2), O_NONBLOCK).

    Raises:
        InputError: code "not-a-file" for everything else; "unreadable" where it is missing or may not be read. The message
            continues a sentence that begins with the file's name.
    """
    try:
        kind = kind_of(path.stat().st_mode)
        if not kind:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
            try:
                kind = kind_of(os.fstat(descriptor).st_mode)
                if not kind:
                    return os.fdopen(descriptor, "rb")
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
    except OSError as e:
        raise InputError(f"cannot be read: {e.strerror or e}.", code="unreadable", detail=repr(e)) from e
    except ValueError as e:  # a name with a null byte
        raise InputError(f"cannot be read: {e}.", code="unreadable") from e
    raise InputError(f"is {kind}, not a file.", code="not-a-file")
