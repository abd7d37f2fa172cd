"""The rows of operators: every certificate one was given, so that each can be refused at once and the last one stays."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import sqlalchemy as sa

from cloud.store import tables as t
from cloud.store.records import OperatorRecord
from cloud.store.statements import insert_new, one_at_a_time
from refold.errors import UsageError

__all__ = ["OperatorRows"]

CHANGING = 7445  # of the locks by number: who is an operator is decided by one at a time
Transaction = Callable[[], AbstractContextManager[sa.Connection]]


class OperatorRows:
    """Every method is one transaction. Raises StorageError, as the store does."""

    def __init__(self, reads: Transaction, writes: Transaction) -> None:
        self._reads, self._writes = reads, writes

    def get(self, serial: str) -> OperatorRecord | None:
        with self._reads() as c:
            row = c.execute(sa.select(t.operators).where(t.operators.c.serial == serial)).mappings().first()
        return OperatorRecord(**row) if row else None

    def all(self) -> list[OperatorRecord]:
        """By name, oldest first."""
        with self._reads() as c:
            return _all(c)

    def adopt(self, record: OperatorRecord) -> OperatorRecord | None:
        """Records a certificate from before there were rows, where its name has none yet; None when it has others."""
        with self._writes() as c:
            one_at_a_time(c, CHANGING)
            known = [r for r in _all(c) if r.name == record.name]
            if not known:
                _insert(c, record)
                return record
        return next((r for r in known if r.serial == record.serial), None)

    def add(self, record: OperatorRecord, *, first: bool) -> None:
        """Records a new certificate.

        Args:
            first: the operator may have no valid one; else it must have had one, and not have been revoked since.

        Raises:
            UsageError: it is not so.
        """
        now = _now_ms()
        with self._writes() as c:
            one_at_a_time(c, CHANGING)
            known = [r for r in _all(c) if r.name == record.name]
            if first and any(is_valid(r, now) for r in known):
                raise UsageError(
                    f"{record.name} is an operator already: `refold cloud operator renew {record.name}` makes a new one.",
                    code="exists",
                )
            if not first and not any(not r.revoked_ms for r in known):
                raise UsageError(
                    f"{record.name!r} is no operator, or was revoked: `refold cloud operator issue {record.name}` makes one.",
                    code="no-operator",
                )
            _insert(c, record)

    def replace(self, name: str, serial: str) -> int:
        """Revokes every certificate of an operator but this one; returns how many that were."""
        return self._end(t.operators.c.name == name, t.operators.c.serial != serial)

    def revoke(self, name: str) -> int:
        """Revokes every certificate of an operator; returns how many were not yet.

        Raises:
            UsageError: there is no such operator, or nobody else could steer the fleet then.
        """
        now = _now_ms()
        with self._writes() as c:
            one_at_a_time(c, CHANGING)
            known = _all(c)
            mine = [r for r in known if r.name == name]
            if not mine:
                names = ", ".join(sorted({r.name for r in known})) or "none"
                raise UsageError(f"There is no operator {name!r}; known: {names}.", code="no-operator")
            others = [r for r in known if r.name != name and is_valid(r, now)]
            if not others and any(is_valid(r, now) for r in mine):
                raise UsageError(
                    f"{name} is the last operator: make another one first (`refold cloud operator issue NAME`).",
                    code="last-operator",
                )
            return int(c.execute(_ending(t.operators.c.name == name)).rowcount)

    def _end(self, *which: sa.ColumnElement[bool]) -> int:
        with self._writes() as c:
            one_at_a_time(c, CHANGING)
            return int(c.execute(_ending(*which)).rowcount)


def is_valid(record: OperatorRecord, now_ms: int) -> bool:
    return not record.revoked_ms and record.expires_ms > now_ms


def _now_ms() -> int:
    return int(time.time() * 1000)


def _all(c: sa.Connection) -> list[OperatorRecord]:
    rows = c.execute(sa.select(t.operators).order_by(t.operators.c.name, t.operators.c.issued_ms, t.operators.c.serial))
    return [OperatorRecord(**r) for r in rows.mappings()]


def _insert(c: sa.Connection, record: OperatorRecord) -> None:
    insert_new(c, t.operators, {n: getattr(record, n) for n in record.__dataclass_fields__})


def _ending(*which: sa.ColumnElement[bool]) -> sa.Update:
    return sa.update(t.operators).where(*which, t.operators.c.revoked_ms == 0).values(revoked_ms=_now_ms())
