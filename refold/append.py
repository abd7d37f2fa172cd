"""Files of lines that are appended to: after a crash, a full disk or a power cut, the next line stands on a line of its own.

A process killed in the middle of a write, or a disk that filled up, leaves a file whose last line is torn. Appended to as it
is, that half and the next line become one line that is neither. `open_append` looks at the end first:

    whole value, only its newline missing     the newline is added: nothing is lost, and it is as valid as it was
    a line of JSON cut short, or zeros        is cut off: it must neither pass for a line nor spoil the next
    anything else                             is ended with a newline: it may be somebody's text, and none of it is lost

Zeros are what a power cut leaves where a file had grown and its blocks were not yet written.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import stat
from pathlib import Path
from typing import BinaryIO

from refold.atomic import sync_directory
from refold.errors import StorageError

__all__ = ["append_line", "open_append"]

log = logging.getLogger(__name__)
LONGEST = 2**20  # bytes of a torn line that are looked at; longer ones are no lines of ours
UNTOUCHED = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})


def open_append(path: Path, *, json_lines: bool = True) -> BinaryIO:
    """Opens a file of lines for appending, unbuffered; made when missing, its torn end mended.

    A regular file that another process has open through this function is left as it is: what looks torn may be a line that is
    being written. A pipe is opened without waiting for its reader, and written without waiting for it.

    Args:
        json_lines: each line is a JSON object or array; False: text, of which nothing is cut off.

    Raises:
        OSError: as `open`. ENXIO: a pipe that nobody reads.
    """
    flags = os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK  # which regular files do not heed
    descriptor = os.open(path, flags | (os.O_WRONLY if _is_pipe(path) else os.O_RDWR | os.O_CREAT), 0o666)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and _ours(descriptor):
            _mend(descriptor, path, json_lines)
        return os.fdopen(descriptor, "ab", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def append_line(path: Path, line: bytes, *, sync: bool = False) -> None:
    """Adds one line of JSON, mending the end of the file first; with `sync` it survives a power cut.

    Raises:
        StorageError: the disk is full, read-only or failing; half a line at the end is mended by the next call.
    """
    try:
        new = sync and not path.exists()
        with open_append(path) as f:
            rest = line + b"\n"
            while rest:
                rest = rest[f.write(rest) or 0 :]
            if sync:
                os.fsync(f.fileno())
        if new:
            sync_directory(path.parent)
    except OSError as e:
        raise StorageError(f"{path} cannot be written: {e.strerror or e}. Free some space or check the disk.") from e


def _is_pipe(path: Path) -> bool:
    try:
        return stat.S_ISFIFO(path.stat().st_mode)
    except OSError:
        return False


def _ours(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        return e.errno not in UNTOUCHED  # no locks on this file system: as if nobody else wrote
    return True


def _mend(descriptor: int, path: Path, json_lines: bool) -> None:
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    start = max(size - LONGEST, 0)
    end = os.pread(descriptor, size - start, start)
    begin = end.rfind(b"\n") + 1
    torn = end[begin:]
    cut = torn.strip(b"\0")[:1] in ((b"", b"{", b"[") if json_lines else (b"",))
    if cut and (begin or start == 0) and not _is_json(torn):
        os.ftruncate(descriptor, start + begin)
        log.warning("%s ended in %d bytes of a line that was never finished: cut off.", path, len(torn))
    else:
        os.write(descriptor, b"\n")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
