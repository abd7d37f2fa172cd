"""The rows. Every public method is one transaction; all are safe from any thread and several processes at once.

Errors come out as `StorageError` (a value that cannot be stored: `InputError`); nothing of SQLAlchemy leaves this folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa

from cloud.store import tables as t
from cloud.store.database import connect, migrate, translated
from cloud.store.operators import OperatorRows
from cloud.store.records import (
    BundleRecord,
    CohortRecord,
    Decision,
    DeviceRecord,
    ReleaseRecord,
    SampleRecord,
    StatisticsRecord,
)
from cloud.store.statements import insert_new, insert_or_update, lock_cohort, one_at_a_time
from refold.errors import AccessError, InputError, ReleaseError

__all__ = ["Store"]

Record = TypeVar("Record", SampleRecord, StatisticsRecord)
GOOD, ROLLED_BACK = "released", "rolled-back"
FORGETTING = 7444  # of the locks by number; migrations hold 7443
BATCH = 500  # bound variables per statement; SQLite's oldest limit is 999


def now_ms() -> int:
    return int(time.time() * 1000)


def token_hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class Store:
    """Opens the database of `url` and brings its schema up to date.

    Raises:
        UsageError: the URL is wrong.
        StorageError: the database cannot be opened, is locked, damaged, or newer than this program.
    """

    def __init__(self, url: str) -> None:
        self._engine = connect(url)
        try:
            migrate(self._engine)
        except BaseException:
            self._engine.dispose()
            raise
        self._writer = self._engine.execution_options(writes=True)
        self.operators = OperatorRows(self._reads, self._writes)

    def close(self) -> None:
        self._engine.dispose()

    @contextlib.contextmanager
    def _reads(self) -> Iterator[sa.Connection]:
        with translated(), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _writes(self) -> Iterator[sa.Connection]:
        with translated(), self._writer.begin() as connection:
            yield connection

    def check(self) -> None:
        """Raises StorageError when the database cannot be written: what readiness means."""
        with self._writes() as c:
            c.execute(sa.update(t.tokens).where(sa.false()).values(uses_left=0))

    # Bundles -----------------------------------------------------------------------------------------------------------------

    def put_bundle(self, bundle: BundleRecord) -> None:
        """Adds a bundle, or replaces its teachers."""
        values = {**_values(bundle), "teachers": [list(p) for p in bundle.teachers]}
        with self._writes() as c:
            insert_or_update(c, t.bundles, values, ["digest"])

    def bundle(self, digest: str) -> BundleRecord | None:
        with self._reads() as c:
            row = c.execute(sa.select(t.bundles).where(t.bundles.c.digest == digest)).mappings().first()
        return _bundle(row) if row else None

    def bundles(self) -> list[BundleRecord]:
        with self._reads() as c:
            return [_bundle(r) for r in c.execute(sa.select(t.bundles).order_by(t.bundles.c.added_ms)).mappings()]

    # Enrolment ---------------------------------------------------------------------------------------------------------------

    def add_token(self, token: str, cohort: str, uses: int, expires_ms: int) -> None:
        """Keeps a join token's hash; the token itself is nowhere stored."""
        with self._writes() as c:
            c.execute(
                sa.insert(t.tokens).values(
                    hash=token_hash(token), cohort=cohort, uses_left=uses, expires_ms=expires_ms, created_ms=now_ms()
                )
            )

    def redeem(self, token: str, device: str) -> str:
        """Spends one use of a token for a device; the same device may repeat it at no cost. Returns the token's cohort.

        Raises:
            AccessError: unknown, spent or expired; which of these is not told.
        """
        digest = token_hash(token)
        valid = sa.and_(t.tokens.c.hash == digest, t.tokens.c.expires_ms >= now_ms())
        with self._writes() as c:
            granted = True
            if insert_new(c, t.joins, {"token": digest, "device": device}):
                # One statement reads and spends: of two transactions, the later sees what the earlier left.
                spend = sa.update(t.tokens).where(valid, t.tokens.c.uses_left > 0).values(uses_left=t.tokens.c.uses_left - 1)
                granted = bool(c.execute(spend).rowcount)
            cohort = c.execute(sa.select(t.tokens.c.cohort).where(valid)).scalar()
            if cohort is None or not granted:
                raise AccessError(
                    "The join token is unknown, used up or expired: ask for a new one (`refold cloud token`).", code="bad-token"
                )
            return str(cohort)

    def put_device(self, device: str, cohort: str, serial: str, expires_ms: int, key_digest: str | None = None) -> None:
        """Records a new certificate; the device is made when it is new. A revoked one stays revoked.

        Args:
            key_digest: of the key that enrols, which alone may enrol under this id; None: a renewal, whose old certificate
                speaks for it.

        Raises:
            AccessError: the device was revoked, or another key enrolled under this id.
        """
        fresh = DeviceRecord(device, cohort, serial, expires_ms, enrolled_ms=now_ms(), key_digest=key_digest or "")
        change = {"cohort": cohort, "serial": serial, "expires_ms": expires_ms}
        with self._writes() as c:
            if insert_new(c, t.devices, _values(fresh)):
                return
            row = c.execute(sa.select(t.devices).where(t.devices.c.id == device).with_for_update()).mappings().one()
            if row["revoked_ms"]:
                raise AccessError(f"Device {device} was revoked.", code="revoked")
            if key_digest is not None and row["key_digest"] != key_digest:
                raise AccessError(f"Another key enrolled as {device}: make a new key and enrol again.", code="id-taken")
            c.execute(sa.update(t.devices).where(t.devices.c.id == device).values(change))

    def check_key(self, device: str, key_digest: str) -> None:
        """Whether a key may enrol as `device`. A key of which only 48 bits are known, from an id of before 2026-11-29, counts.

        Raises:
            AccessError: a device that enrolled with it was revoked, or another key has this id.
        """
        d = t.devices.c
        former = sa.and_(d.key_digest == "", d.id.like(f"%-{key_digest[:12]}"))
        with self._reads() as c:
            out = c.execute(sa.select(d.id).where(d.revoked_ms > 0, sa.or_(d.key_digest == key_digest, former))).scalar()
            taken = c.execute(sa.select(d.id).where(d.id == device, d.key_digest != key_digest)).scalar()
        if out is not None:
            raise AccessError(f"Device {out} was revoked: enrol under a new key.", code="revoked")
        if taken is not None:
            raise AccessError(f"Another key enrolled as {device}: make a new key and enrol again.", code="id-taken")

    def device(self, device: str) -> DeviceRecord | None:
        with self._reads() as c:
            row = c.execute(sa.select(t.devices).where(t.devices.c.id == device)).mappings().first()
        return DeviceRecord(**row) if row else None

    def devices(self) -> list[DeviceRecord]:
        with self._reads() as c:
            return [DeviceRecord(**r) for r in c.execute(sa.select(t.devices).order_by(t.devices.c.id)).mappings()]

    def revoke(self, device: str) -> bool:
        """False when there is no such device."""
        with self._writes() as c:
            found = c.execute(
                sa.update(t.devices)
                .where(t.devices.c.id == device)
                .values(revoked_ms=sa.case((t.devices.c.revoked_ms == 0, now_ms()), else_=t.devices.c.revoked_ms))
            )
            return bool(found.rowcount)

    def saw_device(self, device: str, **seen: Any) -> None:
        """Records what a heartbeat told: any of bundle_digest, release_version, state, domain, metrics, last_error."""
        with self._writes() as c:
            c.execute(sa.update(t.devices).where(t.devices.c.id == device).values(last_seen_ms=now_ms(), **seen))

    # Samples and statistics --------------------------------------------------------------------------------------------------

    def known_samples(self, bundle_digest: str, cohort: str, digests: Sequence[str]) -> set[str]:
        """Those of `digests` that are stored for this bundle and cohort."""
        found: set[str] = set()
        with self._reads() as c:
            for i in range(0, len(digests), BATCH):
                part = t.samples.c.digest.in_(list(digests[i : i + BATCH]))
                found.update(
                    c.execute(sa.select(t.samples.c.digest).where(_of(t.samples, bundle_digest, cohort), part)).scalars()
                )
        return found

    def add_samples(self, samples: Sequence[SampleRecord]) -> list[SampleRecord]:
        """Stores all of them or none; returns those that were not there yet: a second time has no effect."""
        with self._writes() as c:
            return _insert_all(c, t.samples, samples)

    def add_statistics(self, report: StatisticsRecord, most_frames: int | None = None) -> bool:
        """False when it was stored already: a second time has no effect, and counts no frames.

        Args:
            most_frames: that its device may have reported by now, this report included; None: any number.

        Raises:
            InputError: it would have reported more; nothing was stored.
        """
        device = t.devices.c.id == report.device
        total = t.devices.c.frames + report.frames
        with self._writes() as c:
            if not _insert_all(c, t.statistics, [report]):
                return False
            within = sa.true() if most_frames is None else total <= most_frames
            counted = c.execute(sa.update(t.devices).where(device, within).values(frames=total)).rowcount
            if not counted and most_frames is not None:
                raise InputError(
                    f"Device {report.device} reports {report.frames:,} more frames; with those before, that is more than the "
                    f"{most_frames:,} it can have seen since it enrolled (quota.frames_per_second, quota.frames_ahead).",
                    code="implausible",
                )
        return True

    def samples_after(self, bundle_digest: str, cohort: str, after: int, limit: int) -> list[SampleRecord]:
        """The next samples in the order of storing."""
        query = sa.select(t.samples).where(_of(t.samples, bundle_digest, cohort), t.samples.c.id > after)
        with self._reads() as c:
            return [SampleRecord(**r) for r in c.execute(query.order_by(t.samples.c.id).limit(limit)).mappings()]

    def held_back(self, bundle_digest: str, cohort: str, domain: str | None, limit: int) -> list[SampleRecord]:
        """The newest samples kept from training, newest first; `domain` None: of any."""
        query = sa.select(t.samples).where(_of(t.samples, bundle_digest, cohort), t.samples.c.held_back)
        if domain is not None:
            query = query.where(t.samples.c.domain == domain)
        with self._reads() as c:
            return [SampleRecord(**r) for r in c.execute(query.order_by(t.samples.c.id.desc()).limit(limit)).mappings()]

    def statistics_after(self, bundle_digest: str, cohort: str, after: int, limit: int) -> list[StatisticsRecord]:
        """The next reports in the order of storing."""
        query = sa.select(t.statistics).where(_of(t.statistics, bundle_digest, cohort), t.statistics.c.id > after)
        with self._reads() as c:
            return [StatisticsRecord(**r) for r in c.execute(query.order_by(t.statistics.c.id).limit(limit)).mappings()]

    def device_samples(self, device: str) -> int:
        with self._reads() as c:
            return c.execute(sa.select(sa.func.count()).where(t.samples.c.device == device)).scalar_one()

    # Releases ----------------------------------------------------------------------------------------------------------------

    def next_version(self, bundle_digest: str, cohort: str) -> int:
        """The number a release would get; versions are never reused, not even after a rollback."""
        with self._reads() as c:
            last = c.execute(sa.select(t.cohorts.c.last_version).where(_of(t.cohorts, bundle_digest, cohort))).scalar()
        return (last or 0) + 1

    def generation(self, bundle_digest: str, cohort: str) -> int:
        """Grows with every rollback and never falls: how many of the cohort's releases were rolled back."""
        with self._reads() as c:
            return _generation(c, bundle_digest, cohort)

    def record(self, decision: Decision, generation: int | None = None) -> None:
        """Stores a decision; a released one also moves the cohort's pointer, in the same transaction.

        Args:
            generation: the cohort's when work on the candidate began; None: it does not matter.

        Raises:
            ReleaseError: its version is not the next one: another writer was faster. Code "stale": it was rolled back since.
        """
        values = {**_values(decision), "version": decision.version or None}
        with self._writes() as c:
            last = lock_cohort(c, decision.bundle_digest, decision.cohort)["last_version"]
            here = _of(t.cohorts, decision.bundle_digest, decision.cohort)
            if generation is not None and generation != _generation(c, decision.bundle_digest, decision.cohort):
                raise ReleaseError(
                    f"Cohort {decision.cohort!r} was rolled back since this candidate was begun: it is not published.",
                    code="stale",
                )
            if decision.state == GOOD:
                if decision.version != last + 1:
                    raise ReleaseError(f"Version {decision.version} is not the next after {last}.", code="version")
                version = decision.version
                c.execute(sa.update(t.cohorts).where(here).values(current_version=version, last_version=version))
            c.execute(sa.insert(t.releases).values(values))

    def releases(self, bundle_digest: str = "", cohort: str = "") -> list[ReleaseRecord]:
        """Every decision, oldest first, without the signed bytes; "" is any bundle or cohort."""
        columns = [col for col in t.releases.c if col.name != "signed"]
        query = sa.select(*columns, sa.func.length(t.releases.c.signed).label("size")).order_by(t.releases.c.id)
        if bundle_digest:
            query = query.where(t.releases.c.bundle_digest == bundle_digest)
        if cohort:
            query = query.where(t.releases.c.cohort == cohort)
        with self._reads() as c:
            return [ReleaseRecord(**{**r, "version": r["version"] or 0}) for r in c.execute(query).mappings()]

    def good_versions(self, bundle_digest: str, cohort: str) -> dict[int, str]:
        """Version to domain, of every release that was not rolled back: all a poll needs to know."""
        query = sa.select(t.releases.c.version, t.releases.c.domain)
        query = query.where(_of(t.releases, bundle_digest, cohort), t.releases.c.state == GOOD)
        with self._reads() as c:
            return {int(version): str(domain) for version, domain in c.execute(query)}

    def current_version(self, bundle_digest: str, cohort: str) -> int:
        """The cohort's pointer; 0 is as exported."""
        query = sa.select(t.cohorts.c.current_version).where(_of(t.cohorts, bundle_digest, cohort))
        with self._reads() as c:
            return int(c.execute(query).scalar() or 0)

    def signed_release(self, bundle_digest: str, cohort: str, version: int) -> bytes:
        """The serialised SignedRelease. Raises ReleaseError when there is no such version."""
        query = sa.select(t.releases.c.signed).where(_of(t.releases, bundle_digest, cohort), t.releases.c.version == version)
        with self._reads() as c:
            signed = c.execute(query).scalar()
        if signed is None:
            raise ReleaseError(f"Cohort {cohort!r} has no release {version}: see `refold cloud releases`.", code="no-release")
        return bytes(signed)

    def roll_back(self, bundle_digest: str, cohort: str, to_version: int, reason: str) -> int:
        """Points the cohort at `to_version` (0: as exported) and marks every newer release rolled back, for ever.

        Raises:
            ReleaseError: there is no such cohort or version, it was rolled back itself, or it is newer than the current one.
        """
        with self._writes() as c:
            here = _of(t.cohorts, bundle_digest, cohort)
            current = c.execute(sa.select(t.cohorts.c.current_version).where(here).with_for_update()).scalar()
            if current is None:
                raise ReleaseError(f"Cohort {cohort!r} has had no release of this bundle.", code="no-release")
            if to_version == current:
                return int(current)
            rows = _of(t.releases, bundle_digest, cohort)
            target = c.execute(sa.select(t.releases.c.state).where(rows, t.releases.c.version == to_version)).scalar()
            if to_version > current or (to_version and target != GOOD):
                raise ReleaseError(
                    f"Cohort {cohort!r} is at version {current}; version {to_version} is not an earlier good one "
                    "(0 is the exported state).",
                    code="no-release",
                )
            newer = sa.and_(rows, t.releases.c.version > to_version, t.releases.c.state == GOOD)
            c.execute(sa.update(t.releases).where(newer).values(state=ROLLED_BACK, reason=reason))
            c.execute(sa.update(t.cohorts).where(here).values(current_version=to_version))
            return to_version

    def consumed(self, bundle_digest: str, cohort: str) -> dict[str, tuple[int, int]]:
        """Domain to (samples_upto, statistics_upto) of its newest decision, refused ones included."""
        query = sa.select(
            t.releases.c.domain, sa.func.max(t.releases.c.samples_upto), sa.func.max(t.releases.c.statistics_upto)
        )
        with self._reads() as c:
            rows = c.execute(query.where(_of(t.releases, bundle_digest, cohort)).group_by(t.releases.c.domain))
            return {domain: (samples, statistics) for domain, samples, statistics in rows}

    def touch_cohort(self, bundle_digest: str, cohort: str) -> None:
        """Makes the cohort known, so that a distiller looks after it."""
        with self._writes() as c:
            lock_cohort(c, bundle_digest, cohort)

    def cohort(self, bundle_digest: str, cohort: str) -> CohortRecord | None:
        return next(iter(self.cohorts(bundle_digest, cohort)), None)

    def cohorts(self, bundle_digest: str = "", cohort: str = "") -> list[CohortRecord]:
        """Every (bundle, cohort) with its counters; "" is any."""

        def count(table: sa.Table, what: Any) -> Any:
            same = sa.and_(table.c.bundle_digest == t.cohorts.c.bundle_digest, table.c.cohort == t.cohorts.c.cohort)
            return sa.select(what).where(same).scalar_subquery()

        newest = (
            sa.select(t.releases.c.reason)
            .where(t.releases.c.bundle_digest == t.cohorts.c.bundle_digest, t.releases.c.cohort == t.cohorts.c.cohort)
            .order_by(t.releases.c.id.desc())
            .limit(1)
            .scalar_subquery()
        )
        query = sa.select(
            t.cohorts,
            count(t.samples, sa.func.count()).label("samples"),
            count(t.samples, sa.func.coalesce(sa.func.sum(t.samples.c.size), 0)).label("sample_bytes"),
            count(t.statistics, sa.func.count()).label("statistics_reports"),
            sa.func.coalesce(newest, "").label("last_gate"),
        ).order_by(t.cohorts.c.bundle_digest, t.cohorts.c.cohort)
        if bundle_digest:
            query = query.where(t.cohorts.c.bundle_digest == bundle_digest)
        if cohort:
            query = query.where(t.cohorts.c.cohort == cohort)
        with self._reads() as c:
            return [CohortRecord(**{**r, "sample_bytes": int(r["sample_bytes"])}) for r in c.execute(query).mappings()]

    # Retention ---------------------------------------------------------------------------------------------------------------

    def forget(self, *, before_ms: int, samples_per_cohort: int, statistics_per_cohort: int) -> tuple[int, int]:
        """Drops rows older than `before_ms` or beyond the newest n of their cohort; returns (samples, statistics) dropped."""
        dropped = [0, 0]
        with self._writes() as c:
            one_at_a_time(c, FORGETTING)
            pairs = list(c.execute(sa.select(t.cohorts.c.bundle_digest, t.cohorts.c.cohort)))
            for i, (table, most) in enumerate(((t.samples, samples_per_cohort), (t.statistics, statistics_per_cohort))):
                dropped[i] += c.execute(sa.delete(table).where(table.c.received_ms < before_ms)).rowcount
                for bundle_digest, cohort in pairs:
                    here = _of(table, bundle_digest, cohort)
                    edge = c.execute(
                        sa.select(table.c.id).where(here).order_by(table.c.id.desc()).offset(most).limit(1)
                    ).scalar()
                    if edge is not None:
                        dropped[i] += c.execute(sa.delete(table).where(here, table.c.id <= edge)).rowcount
            c.execute(sa.delete(t.tokens).where(t.tokens.c.expires_ms < now_ms()))
            c.execute(sa.delete(t.joins).where(t.joins.c.token.not_in(sa.select(t.tokens.c.hash))))
        return dropped[0], dropped[1]

    def referenced(self, digests: Sequence[str]) -> set[str]:
        """Those of `digests` that a sample or bundle still needs."""
        found: set[str] = set()
        with self._reads() as c:
            for i in range(0, len(digests), BATCH):
                part = list(digests[i : i + BATCH])
                found.update(c.execute(sa.select(t.samples.c.digest).where(t.samples.c.digest.in_(part))).scalars())
                found.update(c.execute(sa.select(t.bundles.c.object).where(t.bundles.c.object.in_(part))).scalars())
        return found


def _of(table: sa.Table, bundle_digest: str, cohort: str) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.bundle_digest == bundle_digest, table.c.cohort == cohort)


def _insert_all(c: sa.Connection, table: sa.Table, records: Sequence[Record]) -> list[Record]:
    for pair in sorted({(r.bundle_digest, r.cohort) for r in records}):  # one order for everybody: no deadlock
        lock_cohort(c, *pair)
    return [r for r in records if insert_new(c, table, {k: v for k, v in _values(r).items() if k != "id"})]


def _generation(c: sa.Connection, bundle_digest: str, cohort: str) -> int:
    rolled_back = sa.and_(_of(t.releases, bundle_digest, cohort), t.releases.c.state == ROLLED_BACK)
    return int(c.execute(sa.select(sa.func.count()).where(rolled_back)).scalar_one())


def _values(record: Any) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in record.__dataclass_fields__}
    return {k: _json(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def _json(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Without NaN and infinities: JSON, and with it PostgreSQL, has none."""
    return {k: v for k, v in numbers.items() if not isinstance(v, float) or math.isfinite(v)}


def _bundle(row: Mapping[Any, Any]) -> BundleRecord:
    return BundleRecord(**{**row, "teachers": tuple((spec, weights) for spec, weights in row["teachers"])})
