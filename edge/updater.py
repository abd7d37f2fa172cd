"""From a signed release to a running engine: verify, admit, write, canary, apply, commit; or exactly what ran before.

    updater = Updater(directory, bundle, ring, apply, cohort=identity.cohort)
    updater.start() -> Release | None               at start: applies what the disk says; None: as exported
    updater.follow(poll_response) -> Outcome        what the authenticated cloud orders: install, roll back, as exported
    updater.offer(signed) -> Outcome                a release from anywhere else: newer ones only
    updater.revert(reason) -> Release | None        it misbehaves here: refuse it for ever, return to the one before
    updater.current, .version                       Release | None and 0.. of what runs now; safe to read on any thread

`apply(release | None)` is the daemon's: build the engine, try it on a canary, swap it in. When it raises, the old engine must
still be serving. It runs on the caller's thread, one call at a time. `canary(release)` may be given apart.

States, kept in a SQLite file of their own (the outbox may be set aside; this memory may not):

    IDLE ──► STAGED ──► CANARY ──► APPLYING ──► IDLE        each arrow is one durable commit
               └──────────┴───────────┴──► IDLE             refused or failed: the old release was never replaced

The commit at the end changes the one row that names the current release; a process killed at any instant therefore finds the
old or the new one, and a release under which the process dies again and again is refused. Every decision about trust is in
edge/trust.py.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from sqlite3 import Connection
from typing import Any

from edge.database import Database
from edge.releases import ReleaseFiles
from edge.trust import Home, Memory, examine
from refold.bundle import Bundle
from refold.errors import NetworkError, RefoldError, ReleaseError, StorageError
from refold.release import Release, admit, digest, open_signed
from refold.signing import KeyRing
from refold.v1 import adaptation_pb2, norms_pb2

__all__ = ["STEPS", "TRANSITIONS", "Apply", "Outcome", "Result", "UpdateState", "Updater"]

log = logging.getLogger(__name__)

Apply = Callable[[Release | None], None]

CRASHES = 3  # a power cut may coincide with an installation or a start once, twice if we are unlucky
JOURNAL_ROWS = 200  # months of releases; for people
STEPS = ("verified", "written", "staged", "canary", "canaried", "applying", "applied", "committed", "pruned")
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


class UpdateState(Enum):
    IDLE = "idle"
    STAGED = "staged"
    CANARY = "canary"
    APPLYING = "applying"


TRANSITIONS: dict[UpdateState, frozenset[UpdateState]] = {
    UpdateState.IDLE: frozenset({UpdateState.STAGED}),
    UpdateState.STAGED: frozenset({UpdateState.CANARY, UpdateState.IDLE}),
    UpdateState.CANARY: frozenset({UpdateState.APPLYING, UpdateState.IDLE}),
    UpdateState.APPLYING: frozenset({UpdateState.IDLE}),
}


class Result(Enum):
    NOTHING = "nothing"  # no order, or already so
    INSTALLED = "installed"
    EXPORTED = "exported"  # back to the state the bundle came with
    REFUSED = "refused"  # will be refused again
    FAILED = "failed"  # worth another try: disk full, out of memory


@dataclass(frozen=True)
class Outcome:
    """What became of an order.

    Attributes:
        version: what runs now.
        error: why that is not what was ordered.
        refused: version of a genuine release that this device will never run, else 0: a later one may be asked for.
    """

    result: Result
    version: int
    error: RefoldError | None = None
    refused: int = 0

    @property
    def settled(self) -> bool:
        """The device runs what the cloud wants."""
        return self.error is None


class Updater:
    """Keeps exactly one release in use. Thread-safe.

    Args:
        directory: for the state and the release files of all bundles; each bundle, cohort and fleet has a folder of its own.
        bundle: the one that runs.
        ring: trusted release keys.
        apply: see the module; called with None for the exported state.
        cohort: of this device.
        fleet: anything that names the fleet, e.g. its CA certificate: another fleet counts its versions anew.
        canary: tries a release without swapping; raises to refuse it.
        now_ms: the wall clock.
        at: called with a name of STEPS when that step is done; tests use it to end the process there.

    Raises:
        StorageError: the directory cannot be used.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        bundle: Bundle,
        ring: KeyRing,
        apply: Apply,
        *,
        cohort: str,
        fleet: bytes = b"",
        canary: Callable[[Release], None] | None = None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        at: Callable[[str], None] = lambda step: None,
    ) -> None:
        member = hashlib.sha256(cohort.encode() + b"\0" + fleet).hexdigest()
        folder = Path(directory) / f"{bundle.digest[:16]}-{member[:8]}"
        self._home = Home(bundle.digest, cohort, bundle.norms, ring)
        self._apply, self._canary, self._now_ms, self._at = apply, canary, now_ms, at
        self._lock = threading.RLock()
        self._files = ReleaseFiles(folder / "releases")
        self._database = Database(folder / "updates.sqlite", SCHEMA)
        self.current: Release | None = None
        if self._database.damaged.exists() and not self._row("highest")[0]:
            self._remember_from_files()

    @property
    def version(self) -> int:
        """Of the release in use; 0 as exported."""
        release = self.current
        return release.version if release else 0

    @property
    def state(self) -> UpdateState:
        return UpdateState(self._row("state")[0])

    def journal(self) -> list[tuple[int, str, str, str]]:
        """(unix ms, what, digest, reason) of the latest changes, oldest first."""
        return [(int(a), str(b), str(c), str(d)) for a, b, c, d in self._database.rows(
            "SELECT unix_ms, what, digest, reason FROM journal ORDER BY id")]  # fmt: skip

    def memory(self) -> Memory:
        current, highest, newest = self._row("current", "highest", "newest_ms")
        rows = self._database.rows("SELECT digest, version, refused FROM releases")
        return Memory(current, highest, {v: d for d, v, _ in rows}, {d: why for d, _, why in rows if why}, newest)

    # ── orders ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def follow(self, response: adaptation_pb2.PollReleaseResponse) -> Outcome:
        """Does what the cloud's answer to this device's own poll says. Never raises a RefoldError: it is in the outcome."""
        with self._lock:
            try:
                if response.use_exported:
                    return self._to_exported("ordered by the cloud")
                if response.HasField("release"):
                    return self._install(response.release, ordered=True)
                return Outcome(Result.NOTHING, self.version)
            except StorageError as e:
                return Outcome(Result.FAILED, self.version, e)
            except RefoldError as e:
                log.warning("A release was refused: %s", e.message)
                if e.code == "try-again":
                    return Outcome(Result.FAILED, self.version, e)
                return Outcome(Result.REFUSED, self.version, e, self._genuine_version(response.release))

    def _genuine_version(self, signed: norms_pb2.SignedRelease) -> int:
        try:
            return open_signed(signed, self._home.ring).version
        except RefoldError:
            return 0

    def offer(self, signed: norms_pb2.SignedRelease) -> Outcome:
        """Installs a release that came by other ways than the poll, when it is newer than all before.

        Raises:
            RefoldError: as `edge.trust.examine`; or it failed its canary; or StorageError. The old release serves.
        """
        with self._lock:
            return self._install(signed, ordered=False)

    def revert(self, reason: str) -> Release | None:
        """Refuses the release in use for ever and returns to the one before it, or to the exported state.

        Returns:
            What runs now.

        Raises:
            StorageError: the decision could not be made durable; the old release still serves.
        """
        with self._lock:
            current, previous = self._row("current", "previous")
            if not current:
                return None
            with self._database.transaction() as t:
                self._refuse(t, current, reason)
            for name in (previous, ""):
                try:
                    release = self._load(name)
                    self._apply(release)
                except Exception as e:
                    if not name:
                        raise
                    log.warning("The release before cannot serve: %s", e)
                    continue
                self._commit(name, release, previous="", reason=reason)
                break
            return self.current

    def forgive(self, version: int) -> None:
        """Lets a release that was refused be tried again."""
        with self._lock, self._database.transaction() as t:
            t.execute("UPDATE releases SET refused = '', crashes = 0 WHERE version = ?", (version,))

    # ── installation ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _install(self, signed: norms_pb2.SignedRelease, *, ordered: bool) -> Outcome:
        self._settle(died=False)
        release = examine(signed, self._home, self.memory(), ordered=ordered, now_unix_ms=self._now_ms())
        name = digest(signed.payload)
        before = self._row("current")[0]
        self._at("verified")
        if name == before and self.current is not None:
            return Outcome(Result.NOTHING, self.version)
        self._files.put(signed)
        self._at("written")
        with self._database.transaction() as t:
            t.execute(
                "INSERT INTO releases (digest, version, crashes) VALUES (?, ?, 1) "
                "ON CONFLICT (digest) DO UPDATE SET crashes = crashes + 1",
                (name, release.version),
            )
            t.execute("UPDATE device SET candidate = ?, newest_ms = MAX(newest_ms, ?)", (name, release.created_unix_ms))
            self._move(t, UpdateState.STAGED)
        self._at("staged")
        try:
            self._step(UpdateState.CANARY, "canary")
            if self._canary is not None:
                self._canary(release)
            self._at("canaried")
            self._step(UpdateState.APPLYING, "applying")
            self._apply(release)
        except Exception as e:
            raise self._abandon(name, release, e) from e
        self._at("applied")
        try:
            self._commit(name, release, previous=before, reason="")
        except StorageError:
            self._take_back()
            raise
        return Outcome(Result.INSTALLED, self.version)

    def _take_back(self) -> None:
        """The disk could not be told of what was just applied and still names the old release: so must the engine."""
        try:
            self._apply(self.current)
        except Exception as e:
            log.error("Release %d cannot be put back into service: %s", self.version, e)

    def _abandon(self, name: str, release: Release, cause: Exception) -> RefoldError:
        """Back to IDLE after a canary or apply that raised; refuses the release unless the cause may pass."""
        passing = isinstance(cause, (StorageError, NetworkError, MemoryError))
        said = cause.message if isinstance(cause, RefoldError) else f"{type(cause).__name__}: {cause}"
        with suppress(StorageError), self._database.transaction() as t:
            if passing:
                t.execute("UPDATE releases SET crashes = 0 WHERE digest = ?", (name,))
            else:
                self._refuse(t, name, said)
            self._move(t, UpdateState.IDLE)
        self._prune()
        if isinstance(cause, StorageError):
            return cause
        return ReleaseError(
            f"Release {release.version} could not be put into service: {said} The one before still serves.",
            code="try-again" if passing else "canary",
            detail=repr(cause),
        )

    def _to_exported(self, reason: str) -> Outcome:
        self._settle(died=False)
        current = self._row("current")[0]
        if not current and self.current is None:
            return Outcome(Result.NOTHING, 0)
        try:
            self._apply(None)
        except RefoldError:
            raise
        except Exception as e:
            raise ReleaseError(f"The exported state could not be put into service: {e}.", code="try-again") from e
        self._at("applied")
        try:
            self._commit("", None, previous=current, reason=reason)
        except StorageError:
            self._take_back()
            raise
        return Outcome(Result.EXPORTED, 0)

    def _commit(self, name: str, release: Release | None, *, previous: str, reason: str) -> None:
        """The one row: from here on the new release is the current one, whatever happens."""
        with self._database.transaction() as t:
            t.execute("UPDATE device SET current = ?, previous = ?, candidate = '', starts = 0", (name, previous))
            if release is not None:
                t.execute("UPDATE device SET highest = MAX(highest, ?)", (release.version,))
                t.execute("UPDATE releases SET crashes = 0 WHERE digest = ?", (name,))
            if UpdateState(t.execute("SELECT state FROM device").fetchone()[0]) is not UpdateState.IDLE:
                self._move(t, UpdateState.IDLE)
            self._note(t, "current", name, reason)
        self.current = release
        self._at("committed")
        self._prune()
        self._at("pruned")

    # ── start ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> Release | None:
        """Applies the release the disk names; failing that the one before it; failing that the exported state.

        A release that cannot be loaded or applied, or under which the process died at several starts, is replaced for good.
        Expiry concerns installation only: a device that is offline for long keeps what it has.

        Returns:
            What runs now; None as exported.

        Raises:
            StorageError: the state cannot be read or written.
            Exception: whatever `apply(None)` raises: the bundle itself does not run here.
        """
        with self._lock:
            self._settle(died=True)
            current, previous, starts = self._row("current", "previous", "starts")
            if current and starts >= CRASHES:
                self._give_up(current, f"The process died at {starts} starts with it.")
            refused = self.memory().refused
            for name in dict.fromkeys((current, previous, "")):
                if name in refused:
                    continue
                try:
                    release = self._load(name)
                    if name:
                        self._count_start(starts + 1 if name == current else 1)
                    self._apply(release)
                except StorageError:
                    raise
                except Exception as e:
                    if not name:
                        raise
                    damaged = isinstance(e, ReleaseError)
                    log.warning("Release %s cannot serve: %s", name[:12], e)
                    if not damaged:
                        self._give_up(name, f"{type(e).__name__}: {e}")
                    continue
                if name != current:
                    self._commit(name, release, previous="", reason="the release before it cannot serve")
                else:
                    self.current = release
                    if name:
                        self._count_start(0)
                break
            self._prune()
            return self.current

    def _count_start(self, n: int) -> None:
        with self._database.transaction() as t:
            t.execute("UPDATE device SET starts = ?", (n,))

    def _give_up(self, name: str, reason: str) -> None:
        with self._database.transaction() as t:
            self._refuse(t, name, reason)

    def _settle(self, *, died: bool) -> None:
        """An installation that a crash or a full disk cut short: the old release stays; the new one may come again, or not."""
        state, candidate = self._row("state", "candidate")
        if UpdateState(state) is UpdateState.IDLE:
            return
        with self._database.transaction() as t:
            if not died:
                t.execute("UPDATE releases SET crashes = 0 WHERE digest = ?", (candidate,))
            row = t.execute("SELECT crashes FROM releases WHERE digest = ?", (candidate,)).fetchone()
            if row and row[0] >= CRASHES:
                self._refuse(t, candidate, f"The process died {row[0]} times while installing it.")
            self._note(t, "interrupted", candidate, state)
            self._move(t, UpdateState.IDLE)

    def _load(self, name: str) -> Release | None:
        """A stored release, its signature and admission checked anew: keys may have been withdrawn since. None as exported."""
        if not name:
            return None
        release = open_signed(self._files.get(name), self._home.ring)
        admit(release, self._home.table, bundle_digest=self._home.bundle_digest, cohort=self._home.cohort, now_unix_ms=0)
        return release

    def _remember_from_files(self) -> None:
        """The state file was damaged: runs as exported, but what the release files prove is not forgotten."""
        for name in self._files.names():
            with suppress(RefoldError):
                release = self._load(name)
                if release is not None:
                    with self._database.transaction() as t:
                        t.execute("INSERT OR IGNORE INTO releases (digest, version) VALUES (?, ?)", (name, release.version))
                        t.execute(
                            "UPDATE device SET highest = MAX(highest, ?), newest_ms = MAX(newest_ms, ?)",
                            (release.version, release.created_unix_ms),
                        )

    # ── the state file ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _row(self, *columns: str) -> tuple[Any, ...]:
        return self._database.rows(f"SELECT {', '.join(columns)} FROM device")[0]

    def _step(self, state: UpdateState, done: str) -> None:
        with self._database.transaction() as t:
            self._move(t, state)
        self._at(done)

    def _move(self, t: Connection, state: UpdateState) -> None:
        before = UpdateState(t.execute("SELECT state FROM device").fetchone()[0])
        if state not in TRANSITIONS[before]:
            raise ReleaseError(
                f"The updater cannot go from {before.value} to {state.value}: this is a fault in Refold.", code="state"
            )
        t.execute("UPDATE device SET state = ?", (state.value,))
        if state is UpdateState.IDLE:
            t.execute("UPDATE device SET candidate = ''")

    def _refuse(self, t: Connection, name: str, reason: str) -> None:
        t.execute("UPDATE releases SET refused = ? WHERE digest = ?", (reason or "no reason given", name))
        self._note(t, "refused", name, reason)

    def _note(self, t: Connection, what: str, name: str, reason: str) -> None:
        t.execute(
            "INSERT INTO journal (unix_ms, what, digest, reason) VALUES (?, ?, ?, ?)", (self._now_ms(), what, name, reason)
        )
        t.execute("DELETE FROM journal WHERE id <= (SELECT MAX(id) FROM journal) - ?", (JOURNAL_ROWS,))

    def _prune(self) -> None:
        self._files.keep_only(self._row("current", "previous", "candidate"))

    def close(self) -> None:
        with self._lock:
            self._database.close()
