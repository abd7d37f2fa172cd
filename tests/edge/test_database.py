"""A database is used as far as its disk lets it: read when full or read-only, opened again, never begun anew in silence."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from small_disk import SmallDisk

from edge import database as module
from edge.database import Database
from refold.errors import StorageError

SCHEMA = "CREATE TABLE IF NOT EXISTS t (a INTEGER)"


@pytest.fixture
def disk(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    with SmallDisk(tmp_path / "disk") as disk:
        yield disk


def add(database: Database, value: int) -> None:
    with database.transaction() as t:
        t.execute("INSERT INTO t VALUES (?)", (value,))


def values(database: Database) -> list[int]:
    return [row[0] for row in database.rows("SELECT a FROM t ORDER BY a")]


def killed_after_commits(path: Path) -> None:
    """Leaves commits that are in the log alone, as a kill does."""
    program = f"""
import os, signal
from edge.database import Database
d = Database({str(path)!r}, {SCHEMA!r})
for i in range(3):
    with d.transaction() as t:
        t.execute("INSERT INTO t VALUES (?)", (i,))
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", program], check=False)
    assert Path(f"{path}-wal").stat().st_size > 0


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("state", ["full", "read-only"])
def test_what_was_committed_is_read_and_changes_are_possible_when_the_disk_is_well(disk, state, killed):
    path = disk.root / "d.sqlite"
    if killed:
        killed_after_commits(path)
    else:
        database = Database(path, SCHEMA)
        for i in range(3):
            add(database, i)
        database.close()
    if state == "full":
        disk.fill()
    else:
        disk.read_only(True)
    database = Database(path, SCHEMA)
    assert values(database) == [0, 1, 2] and database.writable == (state == "full")
    with pytest.raises(StorageError, match="cannot be used"):
        for i in range(1000):
            add(database, 100 + i)
    assert values(database)[:3] == [0, 1, 2]
    if state == "full":
        disk.free()
    else:
        disk.read_only(False)
    add(database, 7)
    assert 7 in values(database) and database.writable
    database.close()
    again = Database(path, SCHEMA)
    assert 7 in values(again) and values(again)[:3] == [0, 1, 2]
    again.close()
    assert not list(Path("/dev/shm").glob("refold-*"))


def test_an_error_that_will_not_pass_opens_the_file_again(disk):
    database = Database(disk.root / "d.sqlite", SCHEMA)
    add(database, 1)
    database._connection.close()  # as good as a file descriptor that went bad
    with pytest.raises(StorageError):
        values(database)
    assert values(database) == [1]
    add(database, 2)
    assert values(database) == [1, 2]
    database.close()
    with pytest.raises(StorageError, match="is closed"):
        values(database)


def test_a_state_that_vanishes_is_not_begun_anew_but_an_outbox_is(disk):
    kept = Database(disk.root / "a" / "d.sqlite", SCHEMA)
    spare = Database(disk.root / "b" / "d.sqlite", SCHEMA, expendable=True)
    for database in (kept, spare):
        add(database, 1)
        shutil.rmtree(database.path.parent)
    with pytest.raises(StorageError, match="was removed while it was in use"):
        values(kept)
    assert not kept.path.exists()
    assert values(spare) == [] and spare.path.exists()
    kept.close()
    spare.close()


def test_nothing_is_tried_more_often_than_now_and_then(tmp_path):
    (tmp_path / "d.sqlite").mkdir()
    database = Database(tmp_path / "d.sqlite", SCHEMA, later=True)
    with pytest.raises(StorageError) as first:
        database.open()
    (tmp_path / "d.sqlite").rmdir()
    with pytest.raises(StorageError) as second:
        add(database, 1)
    assert second.value.message == first.value.message and not database.writable
    database._again = 0.0
    add(database, 1)
    assert values(database) == [1] and database.writable
    database.close()


def test_a_lock_is_waited_for_a_second_and_said_as_one(tmp_path):
    database = Database(tmp_path / "d.sqlite", SCHEMA)
    other = sqlite3.connect(tmp_path / "d.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="Another process holds it"):
        add(database, 1)
    assert values(database) == []
    other.close()
    add(database, 1)
    database.close()
