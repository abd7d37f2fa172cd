"""One SQLite file that survives what happens to devices: WAL, synchronous=FULL, one connection behind one lock.

A file that is damaged is set aside as `<name>.damaged` (the last one is kept, for whoever wants to look) and a new one begun;
a full, read-only or failing disk is a StorageError and leaves the content as it was. Whatever keeps the file from being opened,
at the start or later, keeps being tried: the first use after it is gone works.

    normally            as above
    a full disk         the index of the log needs 32 kB of its own, which are then kept in memory (`locking_mode=exclusive`)
    a read-only disk    what was committed is read from a copy in memory; every change is a StorageError

https://www.sqlite.org/wal.html, sections 5 (read-only) and 7 (exclusive locking, no shared memory)
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from refold.atomic import make_directory
from refold.errors import StorageError

__all__ = ["Database"]

log = logging.getLogger(__name__)

SIDECARS = ("", "-wal", "-shm")
BUSY_S = 1.0  # how long another process may hold the file; its users try again by themselves
RETRY_S = 2.0  # between tries to open a file that could not be opened
CLOSING_S = 2.0  # a thread that is stuck in a disk holds the lock for ever: the process must still be able to end
COPIED_BYTES = 16 * 2**20  # of a file that is copied to be read; states of updates have a hundredth
MEMORY_FOLDER = Path("/dev/shm")


class Database:
    """A SQLite file with a schema of its own. Thread-safe.

    Args:
        path: created with its directory when missing.
        schema: statements that may be run again without effect.
        version: of the schema; a file with a higher one is refused.
        later: open at the first use (or `open`) and not now.
        expendable: what is lost may begin anew: a file that vanishes while it is used is begun again, and no copy is read.
        opened: called with the connection each time the file itself was opened, under the lock.

    Attributes:
        set_aside: where a damaged predecessor went when this one was opened or mended, else None.
        lock: held during each call; held by a caller, several calls are one to other threads.

    Raises:
        StorageError: the file can be neither opened nor read, or a newer Refold made it. Not with `later`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        schema: str,
        version: int = 1,
        *,
        later: bool = False,
        expendable: bool = False,
        opened: Callable[[sqlite3.Connection], None] = lambda connection: None,
    ) -> None:
        self.path = Path(path)
        self.set_aside: Path | None = None
        self.lock = threading.RLock()
        self._schema = schema
        self._version = version
        self._expendable = expendable
        self._opened = opened
        self._connection: sqlite3.Connection | None = None
        self._copy = False  # whether the connection reads a copy and not the file itself
        self._existed = False
        self._inode: tuple[int, int] | None = None
        self._closed = False
        self._why: StorageError | None = None
        self._again = 0.0
        if not later:
            self._use(writing=False)

    # ── opening ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def open(self) -> None:
        """Opens the file when it is not open. Raises StorageError: it cannot be written now."""
        with self.lock:
            self._use(writing=True)

    @property
    def writable(self) -> bool:
        """False while the file could not be opened, or only a copy of it is read. Waits for nothing."""
        return self._connection is not None and not self._copy

    def _use(self, *, writing: bool) -> sqlite3.Connection:
        """The connection; opens one when there is none that will do, at most every RETRY_S."""
        if self._closed:
            raise StorageError(f"{self.path} is closed.")
        if self._connection is not None and not self._copy:
            if self._identity() == self._inode:
                return self._connection
            self._switch_to(None)  # SQLite would go on writing to a file that nobody will ever find again
            self._again = 0.0
        if time.monotonic() >= self._again:
            try:
                self._switch_to(self._open_file())
            except StorageError as e:
                self._why, self._again = e, time.monotonic() + RETRY_S
        if self._connection is not None and not (writing and self._copy):
            return self._connection
        assert self._why is not None
        raise StorageError(self._why.message, code=self._why.code, detail=self._why.detail) from self._why

    def _open_file(self) -> sqlite3.Connection:
        try:
            if self._existed and not self._expendable and not self.path.exists():
                raise StorageError(f"{self.path} was removed while it was in use: restart the device's daemon.", code="removed")
            make_directory(self.path.parent)
            connection = self._open_or_mend()
        except OSError as e:
            raise StorageError(f"{self.path} cannot be made: {e.strerror or e}.") from e
        try:
            self._opened(connection)
        except sqlite3.Error as e:
            connection.close()
            raise self._storage_error(e) from e
        self._existed, self._inode = True, self._identity()
        return connection

    def _identity(self) -> tuple[int, int] | None:
        """Which file is at the path now; None: none, or that cannot be seen."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _open_or_mend(self) -> sqlite3.Connection:
        try:
            return self._open(self.path)
        except sqlite3.OperationalError as e:
            if not _is_busy(e):
                with suppress(sqlite3.Error):
                    return self._open(self.path, exclusive=True)
                if not self._expendable and self._connection is None and self.path.is_file():
                    self._read_copy()
            raise self._storage_error(e) from e
        except sqlite3.DatabaseError as e:
            self._move_aside(e)
        try:
            return self._open(self.path)
        except sqlite3.Error as e:
            raise self._storage_error(e) from e

    def _open(self, path: Path, *, exclusive: bool = False) -> sqlite3.Connection:
        if path == self.path and path.is_file() and not os.access(path, os.W_OK):  # SQLite would open it, for reading only
            raise sqlite3.OperationalError("it may not be written")
        connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            if exclusive:
                connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            found = int(connection.execute("PRAGMA user_version").fetchone()[0])
            if found > self._version:
                raise StorageError(f"{self.path} was made by a newer Refold (schema {found}): update this one.", code="newer")
            if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("quick_check found damage")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA foreign_keys=ON")
            connection.execute("PRAGMA journal_size_limit=8388608")
            if found < self._version:  # an existing file is opened without writing: the disk may be full
                connection.executescript(f"BEGIN IMMEDIATE; {self._schema}; PRAGMA user_version={self._version}; COMMIT;")
        except BaseException:
            connection.close()
            raise
        return connection

    def _read_copy(self) -> None:
        """Connects to a copy of file and log in memory: what was committed, for as long as the file cannot be opened."""
        try:
            if sum(p.stat().st_size for p in self._files() if p.is_file()) > COPIED_BYTES:
                return
            place = MEMORY_FOLDER if os.access(MEMORY_FOLDER, os.W_OK) else None
            with tempfile.TemporaryDirectory(prefix="refold-", dir=place, ignore_cleanup_errors=True) as folder:
                for source in self._files()[:2]:  # without the index, which belongs to the processes that use the file
                    if source.is_file():
                        shutil.copyfile(source, Path(folder) / source.name)
                copied = self._open(Path(folder) / self.path.name)
                memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
                with closing(copied):
                    copied.backup(memory)
            self._switch_to(memory, copy=True)
            self._existed = True
        except (OSError, sqlite3.Error) as e:
            log.warning("%s cannot even be read: %s", self.path, e)

    def _switch_to(self, connection: sqlite3.Connection | None, *, copy: bool = False) -> None:
        before, self._connection, self._copy = self._connection, connection, copy
        if before is not None:
            with suppress(sqlite3.Error):
                before.close()

    # ── damage ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _files(self) -> list[Path]:
        return [self.path.with_name(self.path.name + suffix) for suffix in SIDECARS]

    @property
    def damaged(self) -> Path:
        """Where a damaged file of this name is set aside; exists from then on."""
        return self.path.with_name(self.path.name + ".damaged")

    def _move_aside(self, reason: Exception) -> None:
        aside = self.damaged
        try:
            for old, suffix in zip(self._files(), SIDECARS, strict=True):
                if old.exists():
                    old.replace(aside.with_name(aside.name + suffix))
        except OSError as e:
            raise StorageError(f"{self.path} is damaged and cannot be moved away: {e.strerror or e}.") from e
        self.set_aside = aside
        self._existed = False
        log.warning("%s was damaged (%s): set aside as %s, a new one was begun.", self.path, reason, aside.name)

    def _storage_error(self, e: Exception) -> StorageError:
        advice = "Another process holds it: end that one." if _is_busy(e) else "Free some space or check the disk."
        return StorageError(f"{self.path} cannot be used: {e}. {advice}", detail=repr(e))

    def _failed(self, e: sqlite3.Error) -> StorageError:
        """After a statement that failed: a connection that will not recover by itself is replaced, at most every RETRY_S."""
        if not _is_busy(e) and not _is_full(e) and not self._closed and time.monotonic() >= self._again:
            self._switch_to(None)
            with suppress(StorageError):
                self._use(writing=False)
            self._again = time.monotonic() + RETRY_S
        return self._storage_error(e)

    def _mend(self, reason: sqlite3.DatabaseError) -> StorageError:
        self._switch_to(None)
        try:
            self._move_aside(reason)
            self._switch_to(self._open_file())
        except StorageError as e:
            return e
        return StorageError(f"{self.path} was damaged: it was set aside and a new one begun.", code="damaged")

    # ── use ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; when the block ends without an error the content is on the disk.

        Raises:
            StorageError: full, read-only or failing disk: nothing changed. With code "damaged" the file was set aside and an
                empty one begun.
        """
        with self.lock:
            connection = self._use(writing=True)
            try:
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    with suppress(sqlite3.Error):  # the first error is the one to report
                        if connection.in_transaction:
                            connection.execute("ROLLBACK")
                    raise
            except (sqlite3.OperationalError, sqlite3.ProgrammingError) as e:
                raise self._failed(e) from e
            except sqlite3.IntegrityError:
                raise
            except sqlite3.DatabaseError as e:
                raise self._mend(e) from e

    def rows(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Reads. Raises StorageError as `transaction`, but not for a disk that is only full or read-only."""
        with self.lock:
            connection = self._use(writing=False)
            try:
                return connection.execute(sql, values).fetchall()
            except (sqlite3.OperationalError, sqlite3.ProgrammingError) as e:
                raise self._failed(e) from e
            except sqlite3.DatabaseError as e:
                raise self._mend(e) from e

    def close(self) -> None:
        """Lets go of the file. A thread that is stuck in the disk is waited for only for moments."""
        self._closed = True
        if not self.lock.acquire(timeout=CLOSING_S):
            log.warning("%s is in use by a thread that does not come back: left open.", self.path)
            return
        try:
            self._switch_to(None)
        finally:
            self.lock.release()


def _is_busy(e: Exception) -> bool:
    return "locked" in str(e)  # sqlite_errorcode exists from Python 3.11 on


def _is_full(e: Exception) -> bool:
    return "is full" in str(e)
