"""The database connection: SQLite tuned for one server with many readers, or PostgreSQL; migrated before use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError

from cloud.store.faults import explain
from refold.errors import StorageError, UsageError

__all__ = ["connect", "migrate", "translated"]

CONNECTIONS = 16  # as many as the service has threads: none of them waits for another's
BUSY_MS = 10_000  # a worker's transaction lasts milliseconds; ten seconds mean another program holds the file


def connect(url: str) -> sa.Engine:
    """Opens the database. Raises UsageError for a URL nobody can open."""
    try:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() == "sqlite":
            engine = sa.create_engine(parsed, connect_args={"timeout": BUSY_MS / 1000}, hide_parameters=True)
            sa.event.listen(engine, "connect", _tune_sqlite)
            sa.event.listen(engine, "begin", _begin_immediate)
            return engine
        if parsed.get_backend_name() != "postgresql":
            raise UsageError(f"storage.database cannot be {parsed.get_backend_name()}: Refold knows SQLite and PostgreSQL.")
        # The store's transactions lock what they read before they write it; the level is not the server's to choose.
        return sa.create_engine(
            parsed, pool_pre_ping=True, pool_size=CONNECTIONS, isolation_level="READ COMMITTED", hide_parameters=True
        )
    except ModuleNotFoundError as e:
        hint = " Install it: pip install 'refold[cloud-postgres]'." if e.name == "psycopg" else ""
        raise UsageError(f"storage.database cannot be used: the driver {e.name} is not installed.{hint}") from e
    except (sa.exc.ArgumentError, ImportError) as e:
        raise UsageError(f"storage.database cannot be used: {e}.") from e


def _tune_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions are begun below, not guessed by the driver
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # what was acknowledged survives a power cut
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA busy_timeout={BUSY_MS}")
    cursor.close()


def _begin_immediate(connection: sa.Connection) -> None:
    # A read that later writes would fail at once under a concurrent writer; taking the lock first makes it wait.
    immediate = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def migrate(engine: sa.Engine) -> None:
    """Brings the schema up to this version's. Raises StorageError when the database belongs to a newer Refold."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    with translated(), engine.execution_options(writes=True).begin() as connection:
        config.attributes["connection"] = connection
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(7443)"))
        try:
            ScriptDirectory.from_config(config)
            command.upgrade(config, "head")
        except CommandError as e:
            raise StorageError(
                "The database was made by a newer version of Refold: update this one.", code="newer-database", detail=str(e)
            ) from e


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Database errors as Refold's own, with a sentence (`cloud.store.faults`); anything else passes.

    Raises:
        InputError: a value that no database can store: a number beyond 64 bits, text with a NUL.
        StorageError: everything else.
    """
    try:
        yield
    except (sa.exc.SQLAlchemyError, OverflowError, UnicodeError) as e:
        raise explain(e) from e
