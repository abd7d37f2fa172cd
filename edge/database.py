"""One SQLite file that survives what happens to devices: WAL, synchronous=FULL, one connection behind one lock.

A file that is damaged is set aside as `<name>.damaged` (the last one is kept, for whoever wants to look) and a new one begun;
a full or failing disk is a StorageError and leaves the content as it was.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refold.atomic import make_directory
from refold.errors import StorageError

__all__ = ["Database"]

log = logging.getLogger(__name__)

SIDECARS = ("", "-wal", "-shm")


class Database:
    """A SQLite file with a schema of its own.

    Args:
        path: created with its directory when missing.
        schema: statements that may be run again without effect.
        version: of the schema; a file with a higher one is refused.

    Attributes:
        set_aside: where a damaged predecessor went when this one was opened or mended, else None.

    Raises:
        StorageError: the file cannot be opened or created, or a newer Refold made it.
    """

    def __init__(self, path: str | os.PathLike[str], schema: str, version: int = 1) -> None:
        self.path = Path(path)
        self.set_aside: Path | None = None
        self._schema = schema
        self._version = version
        self._lock = threading.RLock()
        try:
            make_directory(self.path.parent)
            self._connection = self._open()
        except sqlite3.OperationalError as e:
            raise self._storage_error(e) from e
        except sqlite3.DatabaseError as e:
            self._move_aside(e)
            self._connection = self._reopen()
        except OSError as e:
            raise StorageError(f"{self.path} cannot be made: {e.strerror or e}.") from e

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=10.0, isolation_level=None, check_same_thread=False)
        try:
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

    def _reopen(self) -> sqlite3.Connection:
        try:
            return self._open()
        except sqlite3.Error as e:
            raise self._storage_error(e) from e

    @property
    def damaged(self) -> Path:
        """Where a damaged file of this name is set aside; exists from then on."""
        return self.path.with_name(self.path.name + ".damaged")

    def _move_aside(self, reason: Exception) -> None:
        aside = self.damaged
        try:
            for suffix in SIDECARS:
                old = self.path.with_name(self.path.name + suffix)
                if old.exists():
                    old.replace(aside.with_name(aside.name + suffix))
        except OSError as e:
            raise StorageError(f"{self.path} is damaged and cannot be moved away: {e.strerror or e}.") from e
        self.set_aside = aside
        log.warning("%s was damaged (%s): set aside as %s, a new one was begun.", self.path, reason, aside.name)

    def _storage_error(self, e: Exception) -> StorageError:
        return StorageError(f"{self.path} cannot be used: {e}. Free some space or check the disk.", detail=repr(e))

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; when the block ends without an error the content is on the disk.

        Raises:
            StorageError: full, read-only or failing disk: nothing changed. With code "damaged" the file was set aside and an
                empty one begun.
        """
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except (sqlite3.OperationalError, sqlite3.ProgrammingError) as e:
                raise self._storage_error(e) from e
            except sqlite3.IntegrityError:
                raise
            except sqlite3.DatabaseError as e:
                raise self._mend(e) from e

    def rows(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Reads. Raises StorageError as `transaction`."""
        with self._lock:
            try:
                return self._connection.execute(sql, values).fetchall()
            except (sqlite3.OperationalError, sqlite3.ProgrammingError) as e:
                raise self._storage_error(e) from e
            except sqlite3.DatabaseError as e:
                raise self._mend(e) from e

    def _mend(self, reason: sqlite3.DatabaseError) -> StorageError:
        self._connection.close()
        self._move_aside(reason)
        self._connection = self._reopen()
        return StorageError(f"{self.path} was damaged: it was set aside and a new one begun.", code="damaged")

    def close(self) -> None:
        with self._lock:
            self._connection.close()
