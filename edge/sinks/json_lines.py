"""One line of JSON for every prediction, formatted and written behind the frame loop's back.

The frame loop appends to a queue in memory; `flush` runs on a worker. While the disk is full lines wait, up to `WAITING`, and
are then dropped and counted. A file that has grown to its limit becomes `<name>.1` and a new one begins.
"""

from __future__ import annotations

import errno
import json
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from edge.frame_path import Prediction
from refold.append import open_append
from refold.errors import StorageError

__all__ = ["JsonLines"]

WAITING = 65536  # predictions kept while a disk is full: a minute of a fast net, 20 MB
BATCH = 512  # lines per write
PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EAGAIN, errno.EINTR})  # the file itself is well


class JsonLines:
    """A file that predictions are appended to.

    A disk that cannot take the file yet is said by `flush`, at each try, and lines wait for it.

    Args:
        path: the file, or "-" for standard output. A named pipe is never waited for.
        classes: names by index; may be empty.
        limit_bytes: size at which a file is set aside; 0 never.
        later: open the file at the first `flush` (or `check`).

    Raises:
        StorageError: the path is a directory or leads through a file: no disk that recovers will mend that.
    """

    def __init__(self, path: str, classes: Sequence[str] = (), *, limit_bytes: int = 0, later: bool = False) -> None:
        self.dropped = 0
        self._path = None if path == "-" else Path(path)
        self._labels = [json.dumps(name) for name in classes]
        self._limit = limit_bytes
        self._waiting: deque[Prediction] = deque()
        self._file: BinaryIO | None = None
        self._opening = threading.Lock()  # a check may hang in a disk when the first flush comes
        self._lines = b""  # formatted, not yet all on the disk
        self._written = 0  # bytes of them that are: a full disk may take half a line
        if not later:
            self.check()

    def check(self) -> None:
        """Opens the file if that is possible now. Raises StorageError as the constructor."""
        try:
            with self._opening:
                self._open()
        except StorageError as e:
            if isinstance(e.__cause__, FileExistsError | NotADirectoryError | IsADirectoryError):
                raise

    def _open(self) -> BinaryIO:
        if self._file is None and self._path is None:
            self._file = sys.stdout.buffer
        if self._file is None:
            assert self._path is not None
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open_append(self._path)
            except OSError as e:
                raise self._storage_error(e) from e
            self._lines, self._written = self._unwritten(), 0
        return self._file

    def _unwritten(self) -> bytes:
        """The lines that were not written whole before the file was let go: `open_append` ends a line that misses its newline
        only, and cuts off a shorter part."""
        if self._written and self._lines[self._written : self._written + 1] == b"\n":
            return self._lines[self._written + 1 :]
        return self._lines[self._lines.rfind(b"\n", 0, self._written) + 1 :]

    def _storage_error(self, e: OSError) -> StorageError:
        return StorageError(f"Predictions cannot be written to {self._path or 'standard output'}: {e.strerror or e}.")

    def add(self, prediction: Prediction) -> None:
        """Never waits."""
        if len(self._waiting) >= WAITING:
            self.dropped += 1
        else:
            self._waiting.append(prediction)

    def flush(self) -> None:
        """Writes what waits. Raises StorageError when the disk is full: what was not written still waits."""
        while self._lines or self._waiting:
            if not self._lines:
                lines = [self._line(self._waiting.popleft()) for _ in range(min(BATCH, len(self._waiting)))]
                self._lines, self._written = "".join(lines).encode(), 0
            with self._opening:
                file = self._open()
            try:
                while self._written < len(self._lines):
                    taken = file.write(self._lines[self._written :])
                    if taken is None:
                        raise BlockingIOError(errno.EAGAIN, "its reader is behind")
                    self._written += taken
                self._lines = b""
                file.flush()
            except OSError as e:
                self._give_up(e)
                raise self._storage_error(e) from e
            self._rotate()

    def _give_up(self, e: OSError) -> None:
        """Lets go of a file that will not recover, to open it anew: one on a disk that came back, or another reader's pipe."""
        if self._path is not None and self._file is not None and e.errno not in PASSING:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _line(self, p: Prediction) -> str:
        label = f'"label":{self._labels[p.predicted]},' if p.predicted < len(self._labels) else ""
        entropy = p.entropy if p.entropy == p.entropy else -1.0
        probability = p.probability if p.probability == p.probability else -1.0
        marks = (',"corrected":true' if p.corrected else "") + (',"novel":true' if p.novel else "")
        return (
            f'{{"frame":{p.frame},"unix_ms":{p.unix_ms},"source":{json.dumps(p.source)},"class":{p.predicted},{label}'
            f'"probability":{probability:.6g},"entropy":{entropy:.6g},"release_version":{p.release_version},'
            f'"domain":"{p.domain}","overlay":{"true" if p.overlay else "false"},"kept":{"true" if p.kept else "false"},'
            f'"latency_ms":{p.latency_ms:.4g}{marks}}}\n'
        )

    def _rotate(self) -> None:
        if self._path is None or not self._limit or self._file is None or not self._file.seekable():
            return
        if self._file.tell() < self._limit:
            return
        file, self._file = self._file, None
        try:
            file.close()
            self._path.replace(self._path.with_name(self._path.name + ".1"))
        except OSError as e:
            raise self._storage_error(e) from e

    def close(self) -> None:
        """Flushes; raises StorageError when that fails."""
        try:
            self.flush()
        finally:
            if self._path is not None and self._file is not None:
                with suppress(OSError):
                    self._file.close()
                self._file = None
