"""From a signed release to a running engine: verify, admit, write, try, commit, serve; or exactly what ran before.

    updater = Updater(directory, bundle, ring, engines, cohort=identity.cohort)
    updater.start() -> Release | None               at start: serves what the disk says; None: as exported
    updater.follow(poll_response) -> Outcome        what the authenticated cloud orders: install, roll back, as exported
    updater.offer(signed) -> Outcome                a release from anywhere else: newer ones only
    updater.revert(reason) -> Release | None        it misbehaves here: refuse it for ever, return to the one before
    updater.current, .version, .inforce             what is in force now; safe to read on any thread

Several releases are in force at a time, one per domain (edge/updates/inforce.py); the signed files are the only copies, and
each is verified and admitted anew whenever it is read. `engines` builds and tries what a set of releases would serve, beside
what serves (edge/updates/engines.py); a function `apply(release | None)` will do where that is not possible. `canary(release)`
may be given apart. Everything runs on the caller's thread, one event at a time.

The events and their steps are the rows of edge/updates/table.py. Before "committed" a failure or a death leaves the old set
in force, after it the new one; that step is one commit of the state file (SQLite, synchronous=FULL), which is a file of its
own: the outbox may be set aside, this memory may not. A release under which the process dies again and again is refused.
Every decision about trust is in edge/trust.py.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from edge.trust import Home, Memory, examine, examine_lease
from edge.updates.change import Change, Outcome, Result, passing, said, survived
from edge.updates.engines import Apply, AtOnce, Engines
from edge.updates.inforce import Entry, InForce
from edge.updates.memory import UpdateMemory
from edge.updates.shelf import Shelf
from edge.updates.table import DURABLE, STEPS, TABLE, TRANSITIONS, Event, Row, UpdateState
from refold.bundle import Bundle
from refold.errors import RefoldError, ReleaseError, StorageError
from refold.lease import Lease
from refold.release import Release, digest, open_signed
from refold.signing import KeyRing
from refold.v1 import adaptation_pb2, norms_pb2

__all__ = ["DURABLE", "STEPS", "TRANSITIONS", "Apply", "Outcome", "Result", "UpdateState", "Updater"]

log = logging.getLogger(__name__)

JOURNAL_ROWS = 200  # months of releases; for people
CRASHES = 3  # a power cut may coincide with an installation or a start once, twice if we are unlucky


class Updater:
    """Keeps exactly one set of releases in force. Thread-safe.

    Args:
        directory: for the state and the release files of all bundles; each bundle, cohort and fleet has a folder of its own.
        bundle: the one that runs.
        ring: trusted release keys.
        engines: builds, tries and serves; or a function that serves a release (None: the exported state) at once.
        cohort: of this device.
        fleet: anything that names the fleet, e.g. its CA certificate: another fleet counts its versions anew.
        canary: tries a release without serving it, whatever its domain; raises to refuse it.
        now_ms: the wall clock.
        at: called with the name of each step when it is done ("start: " before those of a start); tests end the process there.

    Raises:
        StorageError: the directory cannot be used.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        bundle: Bundle,
        ring: KeyRing,
        engines: Engines | Apply,
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
        self._engines: Engines = AtOnce(engines) if callable(engines) else engines
        self._canary, self._now_ms, self._at = canary, now_ms, at
        self._lock = threading.RLock()
        self._shelf = Shelf(folder / "releases", self._home)
        self._memory = UpdateMemory(folder / "updates.sqlite", now_ms, lambda: JOURNAL_ROWS)
        self._database = self._memory.database
        self.inforce = InForce()
        self._read = False
        self._do = self._steps()
        if self._database.damaged.exists() and not self._memory.row("highest")[0]:
            self._remember_from_files()

    @property
    def current(self) -> Release | None:
        """The newest release in force; None as exported."""
        return self.inforce.release

    @property
    def version(self) -> int:
        """Of the newest release in force; 0 as exported."""
        return self.inforce.version

    @property
    def state(self) -> UpdateState:
        return self._memory.state

    def journal(self) -> list[tuple[int, str, str, str]]:
        """(unix ms, what, digest, reason) of the latest changes, oldest first."""
        return self._memory.journal()

    def memory(self) -> Memory:
        return self._memory.remembered()

    # ── orders ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def follow(self, response: adaptation_pb2.PollReleaseResponse) -> Outcome:
        """Does what the cloud's answer to this device's own poll says. Never raises a RefoldError: it is in the outcome."""
        with self._lock:
            try:
                if response.use_exported:
                    return self._to_exported("ordered by the cloud")
                if response.HasField("release"):
                    return self._install(response.release, self._lease(response), ordered=True)
                return Outcome(Result.NOTHING, self.version)
            except StorageError as e:
                return Outcome(Result.FAILED, self.version, e)
            except RefoldError as e:
                log.warning("A release was refused: %s", e.message)
                if e.code == "try-again":
                    return Outcome(Result.FAILED, self.version, e)
                return Outcome(Result.REFUSED, self.version, e, self._genuine_version(response.release))

    def _lease(self, response: adaptation_pb2.PollReleaseResponse) -> Lease | None:
        """A lease can only extend: one that is not valid is as good as none."""
        if not response.HasField("lease"):
            return None
        try:
            return examine_lease(response.lease, response.release.payload, self._home)
        except ReleaseError as e:
            log.warning("A lease is not counted: %s", e.message)
            return None

    def _genuine_version(self, signed: norms_pb2.SignedRelease) -> int:
        try:
            return open_signed(signed, self._home.ring).version
        except RefoldError:
            return 0

    def offer(self, signed: norms_pb2.SignedRelease) -> Outcome:
        """Installs a release that came by other ways than the poll, when it is newer than all before.

        Raises:
            RefoldError: as `edge.trust.examine`; or it failed its canary; or StorageError. The old releases serve.
        """
        with self._lock:
            return self._install(signed, None, ordered=False)

    def revert(self, reason: str, request: str = "") -> Release | None:
        """Refuses the current release for ever and returns to what was in force before it, or to the exported state.

        Args:
            request: a name of whoever asks; the same name is obeyed once.

        Returns:
            What is current now.

        Raises:
            StorageError: the decision could not be made durable; nothing changed.
            Exception: what would be served then cannot be; nothing changed.
        """
        with self._lock:
            self._prepare()
            current = self.inforce.current
            if current is None or self._memory.carried_out(request):
                return self.current
            after = self._loaded(self.inforce.without({current.digest}), but={current.digest})
            change = Change(Event.REVERT, self.inforce, after, [(current, reason)], reason, request=request)
            self._run(change)
            return self.current

    def forgive(self, version: int) -> None:
        """Lets a release that was refused be tried again, when it is ordered."""
        with self._lock, self._memory.transaction() as t:
            t.execute("UPDATE releases SET refused = '', crashes = 0 WHERE version = ?", (version,))

    def _to_exported(self, reason: str) -> Outcome:
        self._prepare()
        if self.inforce.current is None:
            return Outcome(Result.NOTHING, 0)
        try:
            self._run(Change(Event.EXPORTED, self.inforce, InForce(), reason=reason))
        except RefoldError:
            raise
        except Exception as e:
            raise ReleaseError(f"The exported state could not be put into service: {e}.", code="try-again") from e
        return Outcome(Result.EXPORTED, 0)

    def _install(self, signed: norms_pb2.SignedRelease, lease: Lease | None, *, ordered: bool) -> Outcome:
        self._prepare()
        release = examine(signed, self._home, self.memory(), ordered=ordered, now_unix_ms=self._now_ms(), lease=lease)
        entry = Entry(release.version, release.domain, digest(signed.payload), self._engines.bind(release.domain))
        before = self.inforce
        if before.current is not None and before.current.digest == entry.digest:
            return Outcome(Result.NOTHING, self.version)
        change = Change(Event.INSTALL, before, before.ordered(entry, release), signed=signed, release=release)
        change.newest_ms = max(release.created_unix_ms, lease.issued_unix_ms if lease else 0)
        self._run(change)
        return Outcome(Result.INSTALLED, self.version)

    # ── the table, row by row ───────────────────────────────────────────────────────────────────────────────────────────

    def _steps(self) -> dict[str, Callable[[Change], None]]:
        return {
            "verified": self._verify,
            "written": self._write,
            "staged": self._stage_candidate,
            "canary": lambda change: self._enter(UpdateState.CANARY),
            "canaried": self._try_candidate,
            "applying": lambda change: self._enter(UpdateState.APPLYING),
            "counted": self._count_start,
            "applied": self._try_set,
            "committed": lambda change: self._commit(change),  # noqa: PLW0108  (tests put another in its place)
            "served": self._serve,
            "pruned": lambda change: self._prune(),
        }

    def _run(self, change: Change) -> None:
        """Takes one event through its steps. When one fails, what was in force before is served, reported and stored."""
        row = TABLE[change.event][0]
        try:
            for row in TABLE[change.event]:
                try:
                    self._do[row.step](change)
                except StorageError as e:
                    if not row.survives:
                        raise
                    log.warning("Step %s of %s is made up for later: %s", row.step, change.event.value, e.message)
                self._at(row.step if change.event is not Event.START else f"start: {row.step}")
        except Exception as e:
            if row.step == "pruned":
                log.warning("Releases that are no longer needed could not be removed: %s", e)
                return
            if row.step == "served":
                self._uncommit(change)
            self._settle_quietly(change, row, e)
            ending = self._ending(change, row, e)
            if ending is e:
                raise
            raise ending from e
        finally:
            if change.staged is not None:
                change.staged.drop()

    def _ending(self, change: Change, row: Row, cause: Exception) -> Exception:
        """The error an event ends with."""
        if isinstance(cause, StorageError) or change.release is None or not row.blames:
            return cause
        again = change.blamed is None or passing(cause)
        return ReleaseError(
            f"Release {change.release.version} could not be put into service: {said(cause)} The one before still serves.",
            code="try-again" if again else "canary",
            detail=repr(cause),
        )

    def _settle_quietly(self, change: Change, row: Row, cause: Exception) -> None:
        """Back to IDLE after a failure; the release is refused where the failure is its own. A full disk does this later."""
        with suppress(StorageError):
            if change.blamed is not None and row.blames and not passing(cause):
                kept = change.before.without({change.blamed.digest})
                with self._memory.transaction() as t:
                    self._memory.refuse(t, change.blamed.digest, change.blamed.version, said(cause))
                    if kept.entries != change.before.entries:
                        self._memory.put(t, kept)
                self.inforce = kept
            self._settle(died=False)
            self._prune()

    def _uncommit(self, change: Change) -> None:
        """What was committed cannot be served after all: the state file goes back to what is."""
        log.error("A committed set of releases could not be served: the one before stays in force.")
        with suppress(StorageError), self._memory.transaction() as t:
            refused = [entry.digest for entry, _ in change.refuse]
            self._memory.take_back(t, change.before, refused, change.request, change.floor)

    def _verify(self, change: Change) -> None:
        """`examine` has said yes; what else the set needs is read, and verified, before anything is written."""
        change.after = self._loaded(change.after)

    def _write(self, change: Change) -> None:
        assert change.signed is not None
        self._shelf.put(change.signed)

    def _stage_candidate(self, change: Change) -> None:
        candidate = change.after.current
        assert candidate is not None
        with self._memory.transaction() as t:
            t.execute(
                "INSERT INTO releases (digest, version, crashes) VALUES (?, ?, 1) "
                "ON CONFLICT (digest) DO UPDATE SET crashes = crashes + 1",
                (candidate.digest, candidate.version),
            )
            t.execute("UPDATE device SET candidate = ?, newest_ms = MAX(newest_ms, ?)", (candidate.digest, change.newest_ms))
            self._memory.move(t, UpdateState.STAGED)

    def _enter(self, state: UpdateState) -> None:
        with self._memory.transaction() as t:
            self._memory.move(t, state)

    def _try_candidate(self, change: Change) -> None:
        assert change.release is not None
        if self._canary is not None:
            self._canary(change.release)

    def _try_set(self, change: Change) -> None:
        """Builds what would serve. A release that cannot be built leaves the set, but a new one fails the event."""
        new = change.after.current if change.release is not None else None
        while True:
            try:
                change.staged = self._engines.stage(change.after)
                return
            except Exception as e:
                base = self._engines.base(change.after)
                entry = next((x for x in change.after.entries if x.digest == base), None)
                if entry is None or (new is not None and base == new.digest):
                    raise
                if passing(e) and change.event is not Event.START:
                    raise  # another try may do; a start has to serve now
                log.warning("Release %d cannot serve: %s", entry.version, e)
                if not passing(e):
                    change.refuse.append((entry, f"{type(e).__name__}: {e}"))
                change.after = self._loaded(change.after.without({base}), but={base})

    def _commit(self, change: Change) -> None:
        """From here on the new set is in force, whatever happens."""
        current = change.after.current
        if change.event is Event.START and change.confirmed:
            if current is not None:
                with self._memory.transaction() as t:
                    t.execute("UPDATE device SET starts = 0")
            return
        change.floor = int(self._memory.row("highest")[0])
        with self._memory.transaction() as t:
            for entry, reason in change.refuse:
                self._memory.refuse(t, entry.digest, entry.version, reason)
            if change.request:
                self._memory.count_out(t, change.request)
            self._memory.put(t, change.after)
            self._memory.note(t, "current", current.digest if current else "", change.reason)

    def _serve(self, change: Change) -> None:
        assert change.staged is not None
        change.staged.serve()
        change.staged, self.inforce = None, change.after

    def _prune(self) -> None:
        with suppress(StorageError):  # they are removed the next time
            stored = {e.digest for e in self._memory.entries() or ()}
            self._shelf.keep_only({*self.inforce.digests, *stored, *self._memory.row("current", "previous", "candidate")})

    # ── start ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> Release | None:
        """Serves the releases the disk names. One that cannot be read, verified or built, or under which the process died at
        several starts, gives way to the one before it and in the end to the exported state, for good.

        Expiry concerns installation only: a device that is offline for long keeps what it has. A disk that cannot be written
        changes nothing about what is served: the next start decides the same.

        Returns:
            What is current now; None as exported.

        Raises:
            StorageError: the state cannot be read.
            Exception: whatever staging the exported state raises: the bundle itself does not run here.
        """
        with self._lock:
            with survived("An interrupted update is closed later"):
                self._settle(died=True)
            before, stored = self._from_disk()
            bound = before.bound(self._engines.bind)
            starts = int(self._memory.row("starts")[0])
            if bound.current is not None and starts >= CRASHES:
                before, stored = self._give_up(bound, starts)
                bound = before
            change = Change(Event.START, before, self._loaded(bound), stored=stored)
            change.reason = "" if stored is not None else "taken over from an older version"
            self._run(change)
            self._read = True
            return self.current

    def look(self) -> Release | None:
        """The current release as the state file names it, without serving anything: for `revert` while no daemon runs.

        Raises:
            StorageError: the state cannot be read or written.
        """
        with self._lock:
            self._prepare()
            return self.current

    def _give_up(self, before: InForce, starts: int) -> tuple[InForce, str]:
        """The process died at several starts with the current release: it is put aside before the next one is tried."""
        current = before.current
        assert current is not None
        after = self._loaded(before.without({current.digest}), but={current.digest})
        with survived("A release under which the process dies is put aside later"):
            self._commit(Change(Event.REVERT, before, after, [(current, f"The process died at {starts} starts with it.")]))
        return after, after.current.digest if after.current else ""

    def _count_start(self, change: Change) -> None:
        if change.after.current is not None:
            with self._memory.transaction() as t:
                t.execute("UPDATE device SET starts = starts + 1")

    def _from_disk(self) -> tuple[InForce, str | None]:
        """What the state file says is in force, and its current release; None in place of that when it says so in an older
        Refold's way: one release and the one before it. Those of other domains had no signed copy then.
        """
        current, previous = (str(name) for name in self._memory.row("current", "previous"))
        entries = self._memory.entries()
        if entries is not None:
            return InForce(entries), current
        refused = self._memory.remembered().refused
        inforce = InForce()
        for name in (previous, current):
            with suppress(RefoldError):
                if current and name and name not in refused:
                    release = self._shelf.load(name)
                    entry = Entry(release.version, release.domain, name, self._engines.bind(release.domain))
                    inforce = inforce.ordered(entry, release)
        return inforce, None if current else ""

    def _prepare(self) -> None:
        """Before any event: an interrupted one is closed, and the state file says what is in force."""
        self._settle(died=False)
        if not self._read:
            self.inforce = self._loaded(self._from_disk()[0])
            self._read = True
        stored = self._memory.row("current")[0]
        if stored != (self.inforce.current.digest if self.inforce.current else ""):
            with self._memory.transaction() as t:  # it was damaged and begun anew, or could not be written at start
                self._memory.put(t, self.inforce)
                self._memory.note(t, "current", stored, "written down again")

    def _settle(self, *, died: bool) -> None:
        """An installation that a crash or a full disk cut short: the old releases stay; the new one may come again, or not."""
        state, candidate = self._memory.row("state", "candidate")
        if UpdateState(state) is UpdateState.IDLE:
            return
        with self._memory.transaction() as t:
            if not died:
                t.execute("UPDATE releases SET crashes = 0 WHERE digest = ?", (candidate,))
            row = t.execute("SELECT crashes, version FROM releases WHERE digest = ?", (candidate,)).fetchone()
            if row and row[0] >= CRASHES:
                self._memory.refuse(t, candidate, row[1], f"The process died {row[0]} times while installing it.")
            if died:
                self._memory.note(t, "interrupted", candidate, state)
            self._memory.move(t, UpdateState.IDLE)

    # ── the files ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _loaded(self, wanted: InForce, but: Collection[str] = ()) -> InForce:
        return self._shelf.complete(wanted, {*self._memory.remembered().refused, *but})

    def _remember_from_files(self) -> None:
        """The state file was damaged: runs as exported, but what the release files prove is not forgotten."""
        for name in self._shelf.names():
            with suppress(RefoldError):
                release = self._shelf.load(name)
                with self._memory.transaction() as t:
                    t.execute("INSERT OR IGNORE INTO releases (digest, version) VALUES (?, ?)", (name, release.version))
                    t.execute(
                        "UPDATE device SET highest = MAX(highest, ?), newest_ms = MAX(newest_ms, ?)",
                        (release.version, release.created_unix_ms),
                    )

    def close(self) -> None:
        with self._lock:
            self._memory.close()
