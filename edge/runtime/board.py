"""The status, kept up to date by threads that no disk and no lock of ours can stop.

    collect ─► latest ─┬─► socket   answers whoever asks          edge/runtime/status_socket.py
     every_s           └─► file     data/status.json, by a thread that may be stuck in the disk for as long as it likes

`collect` must be made of values in memory; what may wait for a lock goes through `Latest`.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge.metrics import write_status
from edge.runtime.bounded import bounded
from edge.runtime.staleness import stamp
from edge.runtime.status_socket import StatusSocket
from refold.errors import RefoldError, StorageError

__all__ = ["Board"]

log = logging.getLogger(__name__)
FOLLOW_S = 0.5  # that a start waits for a look at the directory
STUCK_S = 5.0  # a write that takes longer is said


class Board:
    """One daemon's status.

    Args:
        path: of the file; its folder is the data directory.
        collect: the status without its stamp; called every `every_s` on a thread of the board's.
        every_s: seconds between looks.
        ours: whether the file is this process's to write; must return at once.
    """

    def __init__(
        self, path: Path, collect: Callable[[], dict[str, Any]], every_s: float, ours: Callable[[], bool] = lambda: True
    ) -> None:
        self._path, self._collect, self._every_s, self._ours = path, collect, every_s, ours
        self._latest: dict[str, Any] = {}
        self._ended = threading.Event()
        self._changed = threading.Condition()
        self._to_write: dict[str, Any] | None = None
        self._writing_since: float | None = None
        self._problem = ""
        self._socket: StatusSocket | None = None
        self._collecting = threading.Thread(target=self._look, name="status", daemon=True)
        self._writing = threading.Thread(target=self._write, name="status-file", daemon=True)

    def start(self) -> None:
        """Takes a first look at once, on the caller's thread, so that whoever asks is always answered."""
        self._take()
        self._socket = StatusSocket(self._path.parent, lambda: json.dumps(self._latest).encode())
        with suppress(StorageError):  # said by the thread that writes, which tries again
            bounded("status-name", self._socket.follow, FOLLOW_S)
        self._collecting.start()
        self._writing.start()

    @property
    def problem(self) -> str:
        """Why the file is not up to date, in one sentence; empty when it is."""
        since = self._writing_since
        waited = 0.0 if since is None else time.monotonic() - since
        if waited > STUCK_S:
            return f"{self._path} has not been written for {waited:.0f} s: the disk does not answer."
        return self._problem

    def _take(self, *, running: bool = True) -> None:
        try:
            told = self._collect()
        except Exception as e:  # a fault of ours must not freeze what is said of everything else
            if not self._latest.get("status_error"):
                log.exception("The status cannot be collected")
            told = {**self._latest, "status_error": f"{type(e).__name__}: {e}"}
        self._latest = {**told, **stamp(self._every_s), "running": running}
        with self._changed:
            self._to_write = self._latest
            self._changed.notify_all()

    def _look(self) -> None:
        while not self._ended.wait(self._every_s):
            self._take()

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._to_write is not None)
                told, self._to_write = self._to_write, None
            assert told is not None
            self._writing_since = time.monotonic()
            try:
                if self._socket is not None:
                    self._socket.follow()
                if self._ours():
                    write_status(self._path, told)
                self._problem = ""
            except RefoldError as e:
                if e.message != self._problem:
                    log.warning("%s", e.message)
                self._problem = e.message
            finally:
                self._writing_since = None
            if not told["running"]:
                return

    def close(self, patience: float = 2.0) -> Mapping[str, Any]:
        """Says goodbye: the last status, with `running` false, is written if the disk takes it within `patience` seconds.

        Returns:
            The last status.
        """
        self._ended.set()
        if self._collecting.ident is not None:
            self._collecting.join(patience)
        self._take(running=False)
        if self._writing.ident is not None:
            self._writing.join(patience)
        if self._socket is not None:
            self._socket.close()
        return self._latest
