"""The updater's state file: which releases are in force, which are refused, how far an installation got.

device      one row: phase, candidate, current release, version floor, newest time seen, starts since the last good one
releases    every release ever admitted, and why it is refused, if it is
serving     the releases in force; made by the first commit, so that a file of an older Refold opens without a write
requests    rollback requests that were carried out: each counts once, however often its file is found
journal     for people
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from sqlite3 import Connection
from typing import Any

from edge.database import Database
from edge.trust import Memory
from edge.updates.inforce import Entry, InForce
from edge.updates.table import TRANSITIONS, UpdateState
from refold.errors import ReleaseError

__all__ = ["UpdateMemory"]

REQUESTS = 50  # rollback requests remembered: only the latest can still lie in the directory
SCHEMA = """
CREATE TABLE IF NOT EXISTS device (
    id INTEGER PRIMARY KEY CHECK (id = 1), state TEXT NOT NULL DEFAULT 'idle', candidate TEXT NOT NULL DEFAULT '',
    current TEXT NOT NULL DEFAULT '', previous TEXT NOT NULL DEFAULT '', highest INTEGER NOT NULL DEFAULT 0,
    newest_ms INTEGER NOT NULL DEFAULT 0, starts INTEGER NOT NULL DEFAULT 0);
INSERT OR IGNORE INTO device (id) VALUES (1);
CREATE TABLE IF NOT EXISTS releases (
    digest TEXT PRIMARY KEY, version INTEGER NOT NULL, refused TEXT NOT NULL DEFAULT '', crashes INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS journal (
    id INTEGER PRIMARY KEY AUTOINCREMENT, unix_ms INTEGER NOT NULL, what TEXT NOT NULL, digest TEXT NOT NULL,
    reason TEXT NOT NULL)
"""
ADDED = (
    "CREATE TABLE IF NOT EXISTS serving (version INTEGER PRIMARY KEY, domain TEXT NOT NULL, digest TEXT NOT NULL, "
    "key TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS requests (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE)",
)


class UpdateMemory:
    """Raises StorageError when the file cannot be opened."""

    def __init__(self, path: Path, now_ms: Callable[[], int], journal_rows: Callable[[], int]) -> None:
        self.database = Database(path, SCHEMA)
        self._now_ms, self._journal_rows = now_ms, journal_rows

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """All or nothing, and on the disk when it ends."""
        with self.database.transaction() as t:
            yield t

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def row(self, *columns: str) -> tuple[Any, ...]:
        return self.database.rows(f"SELECT {', '.join(columns)} FROM device")[0]

    @property
    def state(self) -> UpdateState:
        return UpdateState(self.row("state")[0])

    def remembered(self) -> Memory:
        """What `edge.trust.examine` wants to know."""
        current, highest, newest = self.row("current", "highest", "newest_ms")
        rows = self.database.rows("SELECT digest, version, refused FROM releases")
        return Memory(current, highest, {v: d for d, v, _ in rows}, {d: why for d, _, why in rows if why}, newest)

    def entries(self) -> tuple[Entry, ...] | None:
        """The releases in force, refused ones left out. None: the file is an older Refold's, which kept one release and the one
        before it.
        """
        if not self._has("serving"):
            return None
        rows = self.database.rows("SELECT version, domain, digest, key FROM serving ORDER BY version")
        entries = [Entry(int(v), str(domain), str(name), str(key)) for v, domain, name, key in rows]
        if (entries[-1].digest if entries else "") != self.row("current")[0]:
            return None  # an older Refold ran on this file in between
        refused = self.remembered().refused
        return tuple(e for e in entries if e.digest not in refused)

    def journal(self) -> list[tuple[int, str, str, str]]:
        rows = self.database.rows("SELECT unix_ms, what, digest, reason FROM journal ORDER BY id")
        return [(int(a), str(b), str(c), str(d)) for a, b, c, d in rows]

    def carried_out(self, request: str) -> bool:
        """Whether this rollback request was carried out before."""
        if not request or not self._has("requests"):
            return False
        return bool(self.database.rows("SELECT 1 FROM requests WHERE name = ?", (request,)))

    def _has(self, table: str) -> bool:
        return bool(self.database.rows("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table,)))

    # ── writing, inside a transaction ───────────────────────────────────────────────────────────────────────────────────

    def move(self, t: Connection, state: UpdateState) -> None:
        """Raises ReleaseError for a step the table does not have."""
        before = UpdateState(t.execute("SELECT state FROM device").fetchone()[0])
        if state not in TRANSITIONS[before]:
            raise ReleaseError(
                f"The updater cannot go from {before.value} to {state.value}: this is a fault in Refold.", code="state"
            )
        t.execute("UPDATE device SET state = ?", (state.value,))
        if state is UpdateState.IDLE:
            t.execute("UPDATE device SET candidate = ''")

    def put(self, t: Connection, inforce: InForce) -> None:
        """The rows that decide: from the commit on these releases are in force."""
        for statement in ADDED:
            t.execute(statement)
        current = inforce.current
        before = next((e.digest for e in reversed(inforce.entries[:-1])), "")
        t.execute(
            "UPDATE device SET current = ?, previous = ?, starts = 0, highest = MAX(highest, ?)",
            (current.digest if current else "", before, inforce.version),
        )
        t.execute("DELETE FROM serving")
        for e in inforce.entries:
            t.execute("INSERT INTO serving (version, domain, digest, key) VALUES (?, ?, ?, ?)",
                      (e.version, e.domain, e.digest, e.key))  # fmt: skip
            t.execute("INSERT OR IGNORE INTO releases (digest, version) VALUES (?, ?)", (e.digest, e.version))
        if current:
            t.execute("UPDATE releases SET crashes = 0 WHERE digest = ?", (current.digest,))
        if UpdateState(t.execute("SELECT state FROM device").fetchone()[0]) is not UpdateState.IDLE:
            self.move(t, UpdateState.IDLE)

    def refuse(self, t: Connection, name: str, version: int, reason: str) -> None:
        """This digest is never served again, until `forgive`."""
        t.execute(
            "INSERT INTO releases (digest, version, refused) VALUES (?, ?, ?) "
            "ON CONFLICT (digest) DO UPDATE SET refused = excluded.refused",
            (name, version, reason or "no reason given"),
        )
        self.note(t, "refused", name, reason)

    def count_out(self, t: Connection, request: str) -> None:
        """This rollback request was carried out."""
        for statement in ADDED:
            t.execute(statement)
        t.execute("INSERT OR IGNORE INTO requests (name) VALUES (?)", (request,))
        t.execute("DELETE FROM requests WHERE id <= (SELECT MAX(id) FROM requests) - ?", (REQUESTS,))

    def take_back(self, t: Connection, inforce: InForce, refused: Sequence[str], request: str, highest: int) -> None:
        """Undoes a commit that could not be followed."""
        for name in refused:
            t.execute("UPDATE releases SET refused = '' WHERE digest = ?", (name,))
        t.execute("DELETE FROM requests WHERE name = ?", (request,))
        t.execute("UPDATE device SET highest = ?", (highest,))
        self.put(t, inforce)
        self.note(t, "taken back", inforce.current.digest if inforce.current else "", "")

    def note(self, t: Connection, what: str, name: str, reason: str) -> None:
        t.execute(
            "INSERT INTO journal (unix_ms, what, digest, reason) VALUES (?, ?, ?, ?)", (self._now_ms(), what, name, reason)
        )
        t.execute("DELETE FROM journal WHERE id <= (SELECT MAX(id) FROM journal) - ?", (self._journal_rows(),))

    def close(self) -> None:
        self.database.close()
