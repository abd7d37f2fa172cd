"""Databases for the tests: a fresh SQLite file, or a fresh schema on the PostgreSQL server that REFOLD_TEST_POSTGRES names."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

BACKENDS = ("sqlite", "postgresql")


@contextlib.contextmanager
def fresh_database(backend: str, folder: Path) -> Iterator[str]:
    """The URL of an empty database. PostgreSQL: skips the test where no server is named, and drops the schema at the end."""
    if backend == "sqlite":
        yield f"sqlite:///{folder / 'refold.db'}"
        return
    server = os.environ.get("REFOLD_TEST_POSTGRES", "")
    if not server:
        pytest.skip("REFOLD_TEST_POSTGRES is unset: run `scripts/with-postgres make test` to test against PostgreSQL")
    name = f"refold_test_{secrets.token_hex(6)}"
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as c:
        c.execute(sa.text(f"CREATE SCHEMA {name}"))
    try:
        yield sa.make_url(server).update_query_dict({"options": f"-csearch_path={name}"}).render_as_string(hide_password=False)
    finally:
        with engine.connect() as c:
            c.execute(sa.text(f"DROP SCHEMA {name} CASCADE"))
        engine.dispose()
