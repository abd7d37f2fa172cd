"""What a database error is called: real ones of both databases, and every class and code a driver may raise."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from cloud.store import DeviceRecord, SampleRecord, Store
from cloud.store import tables as t
from cloud.store.faults import CLASSES, SENTENCES, SQLITE_CODES, STATES, TEXTS, explain, kind_of
from cloud.store.store import _values
from refold.errors import InputError, RefoldError, StorageError, UsageError

BUNDLE = "b" * 64


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    opened = Store(database_url)
    yield opened
    opened.close()


def test_a_row_that_is_there_already_is_a_conflict_and_no_damage(store: Store) -> None:
    row = _values(DeviceRecord("a", "roof", "01", 5))
    with pytest.raises(StorageError, match="try again") as e:
        for _ in range(2):
            with store._writes() as c:
                c.execute(sa.insert(t.devices).values(row))
    assert e.value.code == "conflict"


def test_a_missing_value_is_our_fault_and_no_damage(store: Store) -> None:
    with pytest.raises(StorageError) as e, store._writes() as c:
        c.execute(sa.insert(t.devices).values(id="a"))
    assert e.value.code == "database-failed"


def test_missing_tables_are_told_apart_from_damage(store: Store) -> None:
    with store._writes() as c:
        c.execute(sa.text("DROP TABLE tokens"))
    with pytest.raises(StorageError, match="lacks tables") as e:
        store.add_token("word", "roof", 1, 5)
    assert e.value.code == "schema"


@pytest.mark.parametrize("change", [{"size": 2**63}, {"received_ms": -(2**70)}])
def test_numbers_that_no_column_holds_are_the_requests_fault(store: Store, change: dict[str, Any]) -> None:
    values = {**_values(SampleRecord("a" * 64, BUNDLE, "roof", "device", "d1", b"", 1, False, 5)), **change}
    with pytest.raises(InputError) as e:
        store.add_samples([SampleRecord(**values)])
    assert e.value.code == "bad-value" and store.samples_after(BUNDLE, "roof", 0, 9) == []


def test_text_that_no_column_holds_is_the_requests_fault(store: Store) -> None:
    with pytest.raises(InputError):
        store.known_samples(BUNDLE, "roof", ["\ud800"])
    if store._engine.dialect.name == "postgresql":  # SQLite keeps a NUL
        for work in (lambda: store.current_version("\0", "roof"), lambda: store.add_token("word", "a" * 200, 1, 5)):
            with pytest.raises(InputError) as e:
                work()
            assert e.value.code == "bad-value"


def test_numbers_that_json_has_not_are_left_out(store: Store) -> None:
    store.put_device("a", "roof", "01", 5)
    store.saw_device("a", metrics={"fps": 2.5})
    from cloud.store import Decision

    store.record(Decision(BUNDLE, "roof", "d1", "refused", "why", 5, metrics={"a": 1.0, "b": float("nan")}))
    assert store.releases()[0].metrics == {"a": 1.0}


def test_servers_that_cannot_be_used_say_so() -> None:
    with pytest.raises(StorageError) as e:
        Store("postgresql+psycopg://refold@/refold?host=/nowhere")
    assert e.value.code == "database"
    with pytest.raises(UsageError, match="SQLite and PostgreSQL"):
        Store("mysql+pymysql://x/y")
    server = os.environ.get("REFOLD_TEST_POSTGRES", "")
    if server:
        url = sa.make_url(server)
        for wrong, code in ((url.set(database="nowhere"), "no-database"), (url.set(username="nobody-here"), "database-access")):
            with pytest.raises(StorageError) as e:
                Store(wrong.render_as_string(hide_password=False))
            assert e.value.code == code


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "psycopg":
            raise ModuleNotFoundError("No module named 'psycopg'", name="psycopg")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="cloud-postgres"):
        Store("postgresql+psycopg://refold@/refold")


class DriverError(Exception):
    """A driver's error as SQLAlchemy wraps it."""

    def __init__(self, text: str = "", **marks: str) -> None:
        super().__init__(text)
        for name, value in marks.items():
            setattr(self, name, value)


WRAPPED = [c for c in vars(sa.exc).values() if isinstance(c, type) and issubclass(c, sa.exc.DBAPIError)]


@pytest.mark.parametrize("kind", WRAPPED)
def test_every_class_of_every_driver_has_a_sentence(kind: type[sa.exc.DBAPIError]) -> None:
    error = explain(kind("INSERT ...", {}, DriverError("some words")))
    assert error.message == SENTENCES[error.code] and "some words" in error.detail and "some words" not in error.message
    assert error.code != "damaged"  # nobody is told to restore a backup unless the database itself calls for it


@pytest.mark.parametrize("state", [*STATES, "40001", "40P01", "53300", "57P01", "22003", "42P01", "99999", "XX000"])
def test_postgresql_is_read_by_its_state(state: str) -> None:
    full = state.ljust(5, "0")
    for mark in ("sqlstate", "pgcode"):
        code = kind_of(sa.exc.OperationalError("", {}, DriverError("words", **{mark: full})))
        assert code == STATES.get(full, STATES.get(full[:2], "database"))
    assert (kind_of(sa.exc.InternalError("", {}, DriverError(sqlstate="XX001"))) == "damaged") and "XX000" not in STATES


@pytest.mark.parametrize("name", [*SQLITE_CODES, "SQLITE_IOERR_WRITE", "SQLITE_BUSY_SNAPSHOT", "SQLITE_CORRUPT_VTAB"])
def test_sqlite_is_read_by_its_result_code(name: str) -> None:
    code = kind_of(sa.exc.DatabaseError("", {}, DriverError("words", sqlite_errorname=name)))
    assert code == SQLITE_CODES.get(name, SQLITE_CODES.get(name.rpartition("_")[0]))


TEXT = {
    "UNIQUE constraint failed: devices.id": "conflict", "NOT NULL constraint failed: devices.id": "database-failed",
    "database disk image is malformed": "damaged", "file is not a database": "damaged", "no such table: tokens": "schema",
    "database is locked": "database-locked", "database or disk is full": "disk-full", "disk I/O error": "disk-failing",
    "attempt to write a readonly database": "database-read-only", "unable to open database file": "database",
    'FATAL:  password authentication failed for user "x"': "database-access",
    "sorry, too many clients already": "database-busy",
    'FATAL:  database "x" does not exist': "no-database", "connection refused": "database",
}  # fmt: skip


@pytest.mark.parametrize("text", TEXT)
def test_without_a_code_the_text_is_read(text: str) -> None:
    assert (
        kind_of(sa.exc.OperationalError("", {}, sqlite3.OperationalError(text) if "FATAL" not in text else DriverError(text)))
        == (TEXT[text])
    )


def test_every_other_error_of_sqlalchemy_becomes_one_of_ours() -> None:
    found = {c for c in vars(sa.exc).values() if isinstance(c, type) and issubclass(c, sa.exc.SQLAlchemyError)}
    assert len(found) > 20
    statement = {kind for kind in found if issubclass(kind, sa.exc.StatementError)}
    assert kind_of(sa.exc.StatementError("message", "INSERT", {}, TypeError())) == "bad-value"
    for kind in found - statement:
        error = explain(kind.__new__(kind))
        assert isinstance(error, RefoldError) and error.code in SENTENCES and error.code != "damaged", kind
    named = {kind for _, kind in (*CLASSES, *TEXTS)} | set(STATES.values()) | set(SQLITE_CODES.values())
    assert named == set(SENTENCES)
