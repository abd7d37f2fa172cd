"""What waits to go up: samples ordered by score and statistics reports, in one durable SQLite file.

    outbox = Outbox(directory / "outbox.sqlite", limit_bytes=64 * 2**20)
    outbox.put(header, payload) -> bool             False: full, and everything in it scores higher
    outbox.put_many([(header, payload), ...])       one commit (one fsync) for several
    outbox.headers(n), .samples(digests), .next(n)  best first; nothing is removed
    outbox.forget(digests)                          the cloud has them, or does not want them
    outbox.demote(digests)                          something went wrong with them: others first
    outbox.put_report(report), .reports(), .forget_report(digest)
    outbox.subscribe(callback)                      called after something was put
    ByteBudget(bytes_per_hour, outbox)              shares the file: edge/budget.py

Beyond `limit_bytes` the lowest score goes first and, among equals, the oldest. A picture that is put again changes nothing.
What was put is on the disk when the call returns.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from sqlite3 import Connection

from edge.database import Database
from refold.errors import InputError
from refold.limits import LIMITS
from refold.v1 import samples_pb2 as pb

__all__ = ["Outbox"]

REPORTS = 32  # a few domains times a few release versions; older ones describe engines that no longer serve
SCHEMA = """
CREATE TABLE IF NOT EXISTS samples (
    id INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL UNIQUE, score REAL NOT NULL, bytes INTEGER NOT NULL,
    header BLOB NOT NULL, payload BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS samples_by_score ON samples (score, id);
CREATE TABLE IF NOT EXISTS totals (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT OR IGNORE INTO totals VALUES ('bytes', 0), ('samples', 0), ('evicted', 0);
CREATE TRIGGER IF NOT EXISTS sample_added AFTER INSERT ON samples BEGIN
    UPDATE totals SET value = value + NEW.bytes WHERE name = 'bytes';
    UPDATE totals SET value = value + 1 WHERE name = 'samples';
END;
CREATE TRIGGER IF NOT EXISTS sample_removed AFTER DELETE ON samples BEGIN
    UPDATE totals SET value = value - OLD.bytes WHERE name = 'bytes';
    UPDATE totals SET value = value - 1 WHERE name = 'samples';
END;
CREATE TABLE IF NOT EXISTS reports (
    id INTEGER PRIMARY KEY AUTOINCREMENT, bundle TEXT NOT NULL, version INTEGER NOT NULL, domain TEXT NOT NULL,
    digest TEXT NOT NULL, report BLOB NOT NULL, UNIQUE (bundle, version, domain));
CREATE TABLE IF NOT EXISTS spent (minute INTEGER PRIMARY KEY, bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS clock (
    id INTEGER PRIMARY KEY CHECK (id = 1), seconds REAL NOT NULL, wall REAL NOT NULL, boot TEXT NOT NULL, steady REAL NOT NULL)
"""


class Outbox:
    """A durable queue bounded in bytes. Thread-safe.

    Args:
        path: the SQLite file; made when missing, set aside when damaged (see `edge.database`).
        limit_bytes: of headers and payloads together; pages make the file up to half as large again, its log adds up to 8 MB.
        later: open the file at the first use (or `open`); until then the totals are 0.

    Raises:
        StorageError: the file cannot be opened. Not with `later`.
    """

    def __init__(self, path: str | os.PathLike[str], limit_bytes: int = 64 * 2**20, *, later: bool = False) -> None:
        self.limit_bytes = limit_bytes
        self._callbacks: list[Callable[[], None]] = []
        self._totals: dict[str, int] = {}  # as of the last commit: asked for by threads that must not wait for a disk
        self.database = Database(path, SCHEMA, later=later, expendable=True, opened=self._count)

    def open(self) -> None:
        """Opens the file when it is not open, and tells of what is in it. Raises StorageError: it cannot be written now."""
        if not self.database.writable:
            self.database.open()
            self._tell()

    def _count(self, t: Connection) -> None:
        self._totals = {str(name): int(value) for name, value in t.execute("SELECT name, value FROM totals")}

    @contextmanager
    def _changing(self) -> Iterator[Connection]:
        with self.database.lock:
            with self.database.transaction() as t:
                yield t
                totals = t.execute("SELECT name, value FROM totals").fetchall()
            self._totals = {str(name): int(value) for name, value in totals}

    def subscribe(self, callback: Callable[[], None]) -> None:
        """`callback` runs on the putting thread after each put that kept something; it must not block."""
        self._callbacks.append(callback)

    def put(self, header: pb.SampleHeader, payload: bytes) -> bool:
        """Keeps a sample, at the expense of lower scores when full.

        Returns:
            True when the sample is in the outbox afterwards.

        Raises:
            InputError: the payload is not what the header's digest says, or too large for any cloud.
            StorageError: the disk is full or failing; what was in the outbox still is.
        """
        return self.put_many([(header, payload)]) == 1

    def put_many(self, samples: Sequence[tuple[pb.SampleHeader, bytes]]) -> int:
        """`put` for several in one commit: all are durable or none. Returns how many are in the outbox afterwards."""
        for header, payload in samples:
            _check(header, payload)
        with self._changing() as t:
            for header, payload in samples:
                raw = header.SerializeToString(deterministic=True)
                score = header.score if math.isfinite(header.score) else 0.0
                t.execute(
                    "INSERT OR IGNORE INTO samples (digest, score, bytes, header, payload) VALUES (?, ?, ?, ?, ?)",
                    (header.digest, score, len(raw) + len(payload), raw, payload),
                )
            over = int(t.execute("SELECT value FROM totals WHERE name = 'bytes'").fetchone()[0]) - self.limit_bytes
            victims = []
            if over > 0:
                for number, size in t.execute("SELECT id, bytes FROM samples ORDER BY score, id"):
                    victims.append((number,))
                    over -= size
                    if over <= 0:
                        break
            t.executemany("DELETE FROM samples WHERE id = ?", victims)
            t.execute("UPDATE totals SET value = value + ? WHERE name = 'evicted'", (len(victims),))
            kept = sum(
                t.execute("SELECT COUNT(*) FROM samples WHERE digest = ?", (digest,)).fetchone()[0]
                for digest in {header.digest for header, _ in samples}
            )
        if kept:
            self._tell()
        return int(kept)

    def _tell(self) -> None:
        for callback in self._callbacks:
            callback()

    def headers(self, n: int, limit_bytes: int | None = None) -> list[pb.SampleHeader]:
        """The best `n` headers, highest score first and newest among equals; payloads stay on the disk.

        Args:
            limit_bytes: stop before headers and payloads together exceed this.
        """
        out, left = [], math.inf if limit_bytes is None else limit_bytes
        for raw, size in self.database.rows(
            "SELECT header, bytes FROM samples ORDER BY score DESC, id DESC LIMIT ?", (max(n, 0),)
        ):
            left -= size
            if left < 0:
                break
            out.append(pb.SampleHeader.FromString(raw))
        return out

    def samples(self, digests: Iterable[str]) -> list[pb.Sample]:
        """Whole samples, in the order asked for; those no longer there are left out."""
        out = []
        for digest in digests:
            for raw, payload in self.database.rows("SELECT header, payload FROM samples WHERE digest = ?", (digest,)):
                out.append(pb.Sample(header=pb.SampleHeader.FromString(raw), payload=payload))
        return out

    def next(self, n: int) -> list[pb.Sample]:
        """The best `n` samples; the same again until they are forgotten."""
        return self.samples(header.digest for header in self.headers(n))

    def forget(self, digests: Iterable[str]) -> int:
        """Removes samples; unknown digests are no error. Returns how many there were."""
        with self._changing() as t:
            return sum(t.execute("DELETE FROM samples WHERE digest = ?", (digest,)).rowcount for digest in set(digests))

    def demote(self, digests: Iterable[str]) -> None:
        """Halves the order (not the header's score) of samples that could not be sent, so that others go first."""
        with self.database.transaction() as t:
            t.executemany("UPDATE samples SET score = score / 2 WHERE digest = ?", [(digest,) for digest in set(digests)])

    def put_report(self, report: pb.StatisticsReport) -> None:
        """Queues a statistics report in place of an older one of the same bundle, release version and domain."""
        key = (report.bundle_digest, report.release_version, report.domain)
        with self.database.transaction() as t:
            t.execute("DELETE FROM reports WHERE bundle = ? AND version = ? AND domain = ?", key)
            t.execute(
                "INSERT INTO reports (bundle, version, domain, digest, report) VALUES (?, ?, ?, ?, ?)",
                (*key, report.digest, report.SerializeToString(deterministic=True)),
            )
            t.execute("DELETE FROM reports WHERE id NOT IN (SELECT id FROM reports ORDER BY id DESC LIMIT ?)", (REPORTS,))
        self._tell()

    def reports(self, n: int = 1) -> list[pb.StatisticsReport]:
        """The newest reports first: what describes the engine that serves now."""
        rows = self.database.rows("SELECT report FROM reports ORDER BY id DESC LIMIT ?", (n,))
        return [pb.StatisticsReport.FromString(raw) for (raw,) in rows]

    def forget_report(self, digest: str) -> None:
        """Removes the report with this digest; a newer one that replaced it meanwhile stays."""
        with self.database.transaction() as t:
            t.execute("DELETE FROM reports WHERE digest = ?", (digest,))

    def __len__(self) -> int:
        return self._totals.get("samples", 0)

    @property
    def bytes(self) -> int:
        """Bytes of headers and payloads now in the outbox. Like the other totals, known without waiting for the disk."""
        return self._totals.get("bytes", 0)

    @property
    def evicted(self) -> int:
        """Samples given up for better ones since the file was made."""
        return self._totals.get("evicted", 0)

    def close(self) -> None:
        self.database.close()


def _check(header: pb.SampleHeader, payload: bytes) -> None:
    if len(payload) > LIMITS.sample_bytes:
        raise InputError(
            f"A sample of {len(payload)} bytes exceeds the limit of {LIMITS.sample_bytes}.", code="sample-too-large"
        )
    if hashlib.sha256(payload).hexdigest() != header.digest:
        raise InputError("A sample's payload does not match the digest in its header.", code="digest")
