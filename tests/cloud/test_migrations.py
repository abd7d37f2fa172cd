"""Databases of earlier versions open with everything in them."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from cloud.store import Store, database
from cloud.store.database import connect

FIRST, OLD = "20261124_first", "gate-7-0123456789ab"


def steps(url: str, to: str, *, down: bool = False) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).with_name("migrations")))
    engine = connect(url)
    with engine.execution_options(writes=True).begin() as c:
        config.attributes["connection"] = c
        (command.downgrade if down else command.upgrade)(config, to)
    engine.dispose()


def fill(url: str) -> None:
    """What the version of 2026-11-24 left behind."""
    engine = connect(url)
    d, b = "a" * 64, "b" * 64
    rows = (
        f"INSERT INTO bundles VALUES ('{b}', 'net', '{d}', '{d}', 32, 32, '[]', 5)",
        f"INSERT INTO tokens VALUES ('{d}', 'roof', 1, 99999999999999, 5)",
        f"INSERT INTO joins VALUES ('{d}', '{OLD}')",
        f"INSERT INTO devices VALUES ('{OLD}', 'roof', '0a', 7, 5, 0, 6, '', 1, 'running', 'd1', '{{\"fps\": 30.0}}', '')",
        "INSERT INTO devices VALUES ('gate-8-0123456789ab', 'roof', '0b', 7, 5, 6, 6, '', 1, 'running', 'd1', '{}', '')",
        f"INSERT INTO cohorts VALUES ('{b}', 'roof', 1, 1)",
        f"INSERT INTO samples VALUES (1, '{d}', '{b}', 'roof', '{OLD}', 'd1', 'h', 10, true, 5)",
        f"INSERT INTO statistics VALUES (1, '{d}', '{b}', 'roof', '{OLD}', 'd1', 1, 64, 'p', 5)",
        f"INSERT INTO releases VALUES (1, '{b}', 'roof', 1, 0, 'd1', 'released', 'why', 5, '{d}', 's', 1, 64, '{{}}', 1, 1)",
    )
    with engine.execution_options(writes=True).begin() as c:
        for row in rows:
            c.exec_driver_sql(row)
    engine.dispose()


def test_the_first_schema_with_data_is_brought_up_to_date(database_url: str) -> None:
    steps(database_url, FIRST)
    fill(database_url)
    for _ in range(2):  # the second start finds nothing to do
        store = Store(database_url)
        device, revoked = store.devices()
        assert (device.id, device.serial, device.metrics, device.key_digest, device.frames) == (
            OLD, "0a", {"fps": 30.0}, "", 0,
        )  # fmt: skip
        assert revoked.revoked_ms == 6
        assert [r.version for r in store.releases()] == [1] and store.current_version("b" * 64, "roof") == 1
        assert len(store.samples_after("b" * 64, "roof", 0, 9)) == len(store.statistics_after("b" * 64, "roof", 0, 9)) == 1
        assert store.bundles()[0].name == "net" and store.device_samples(device.id) == 1
        store.close()


def test_every_step_can_be_taken_back(database_url: str) -> None:
    Store(database_url).close()
    steps(database_url, "base", down=True)
    engine = connect(database_url)
    assert set(sa.inspect(engine).get_table_names()) <= {"alembic_version"}
    engine.dispose()
    Store(database_url).close()
