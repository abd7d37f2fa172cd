"""Where a daemon can be asked for its status when its disk cannot be written or read: a socket without a file.

The name is in Linux's abstract namespace (unix(7)): it needs no directory, and ends with the process. It is made of the data
directory's path and inode, so that two containers on one network do not answer for each other. A name can be taken by
anybody, so both sides ask the kernel who is at the other end (SO_PEERCRED). Elsewhere than on Linux there is no such socket,
and only the file tells.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from refold.errors import StorageError

__all__ = ["StatusSocket", "ask"]

log = logging.getLogger(__name__)
LINUX = sys.platform == "linux"
TIMEOUT_S = 2.0
LARGEST = 4 * 2**20  # bytes of an answer; a status has a few thousand


def _name(directory: Path) -> bytes:
    where = os.path.realpath(directory)
    try:
        found = Path(where).stat()
        inode = f"{found.st_dev}:{found.st_ino}"
    except OSError:
        inode = "-"
    return b"\0refold-edge-" + hashlib.sha256(f"{where}\0{inode}".encode()).hexdigest()[:32].encode()


def _trusted(peer: socket.socket, directory: Path) -> bool:
    """Whether the other end is root, this user, or the directory's owner."""
    _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    allowed = {0, os.geteuid()}
    with suppress(OSError):
        allowed.add(directory.stat().st_uid)
    return uid in allowed


class StatusSocket:
    """Answers each connection with the latest status, on a thread of its own that touches no disk.

    Args:
        directory: the data directory.
        latest: the status as JSON; must return at once.
    """

    def __init__(self, directory: Path, latest: Callable[[], bytes]) -> None:
        self._directory, self._latest = directory, latest
        self._closing = False
        self._name = b""
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def follow(self) -> None:
        """Begins to answer; moves to another name when the directory is another one than before: made, or mounted, meanwhile.

        Looks at the directory: for a thread that may wait for a disk.

        Raises:
            StorageError: the name is taken, or sockets are forbidden here; nobody is answered until a later call.
        """
        name = _name(self._directory)
        if not LINUX or name == self._name or self._closing:
            return
        self._let_go()
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.bind(name)
            listening.listen(8)
        except OSError as e:
            listening.close()
            raise StorageError(f"The status cannot be asked for over a socket: {e.strerror or e}.") from e
        self._name, self._socket = name, listening
        self._thread = threading.Thread(target=self._serve, args=(listening,), name="status-socket", daemon=True)
        self._thread.start()

    def _serve(self, listening: socket.socket) -> None:
        while listening is self._socket:
            try:
                peer, _ = listening.accept()
            except OSError:
                time.sleep(0.1)  # too many open files, or let go
                continue
            with peer, suppress(OSError):
                if _trusted(peer, self._directory):
                    peer.settimeout(TIMEOUT_S)
                    peer.sendall(self._latest())

    def _let_go(self) -> None:
        listening, self._socket, self._name = self._socket, None, b""
        if listening is not None:
            with suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # ends accept
            listening.close()
            if self._thread is not None:
                self._thread.join(TIMEOUT_S)  # the name is free once nobody waits in accept

    def close(self) -> None:
        self._closing = True
        self._let_go()


def ask(directory: Path) -> dict[str, Any] | None:
    """The status a running daemon gives when asked; None when none answers."""
    if not LINUX:
        return None
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
            s.settimeout(TIMEOUT_S)
            s.connect(_name(directory))
            if not _trusted(s, directory):
                log.warning("Another user answers for the daemon of %s: not believed.", directory)
                return None
            parts, size = [], 0
            while part := s.recv(65536):
                parts.append(part)
                size += len(part)
                if size > LARGEST:
                    return None
        told = json.loads(b"".join(parts))
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None
