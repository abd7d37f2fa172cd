"""Statements that mean the same to SQLite, which has one writer, and to PostgreSQL, where transactions run beside each other.

A row that is read in order to be written is locked first (`with_for_update`, which SQLite needs not and ignores); one that may
be there already is inserted by a statement that says so. PostgreSQL runs at READ COMMITTED: after a lock was waited for, the
next statement sees what its holder committed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from cloud.store import tables as t

__all__ = ["insert_new", "insert_or_update", "lock_cohort", "one_at_a_time"]


def _insert(c: sa.Connection, table: sa.Table) -> Any:
    return postgresql.insert(table) if c.dialect.name == "postgresql" else sqlite.insert(table)


def insert_new(c: sa.Connection, table: sa.Table, values: Mapping[str, Any]) -> bool:
    """Inserts a row unless one with a key of its is there; False when it was, whoever put it there in whichever transaction."""
    statement = _insert(c, table).values(**values).on_conflict_do_nothing()
    return c.execute(statement, execution_options={"preserve_rowcount": True}).rowcount > 0


def insert_or_update(c: sa.Connection, table: sa.Table, values: Mapping[str, Any], key: Sequence[str]) -> None:
    """Inserts a row, or gives the one with the same `key` (its primary key) the other values."""
    others = {name: value for name, value in values.items() if name not in key}
    c.execute(_insert(c, table).values(**values).on_conflict_do_update(index_elements=list(key), set_=others))


def lock_cohort(c: sa.Connection, bundle_digest: str, cohort: str) -> sa.RowMapping:
    """The cohort's row, made where it is missing; nobody else changes this cohort until the transaction ends.

    Rows of samples and statistics are numbered under this lock, so that they become visible in the order of their numbers: a
    worker that has read up to one number will never miss a smaller one.
    """
    insert_new(c, t.cohorts, {"bundle_digest": bundle_digest, "cohort": cohort, "current_version": 0, "last_version": 0})
    here = sa.and_(t.cohorts.c.bundle_digest == bundle_digest, t.cohorts.c.cohort == cohort)
    return c.execute(sa.select(t.cohorts).where(here).with_for_update()).mappings().one()


def one_at_a_time(c: sa.Connection, number: int) -> None:
    """Waits until no other transaction holds `number`, then holds it to the end of this one."""
    if c.dialect.name == "postgresql":
        c.execute(sa.select(sa.func.pg_advisory_xact_lock(number)))
