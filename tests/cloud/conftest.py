"""Fixtures of the service's tests. Everything is real: TLS on loopback, SQLite, engines, processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from databases import BACKENDS, fresh_database
from fleet_of import Fleet, make_bundle

from cloud.bundles import register
from refold.bundle import Bundle


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with a running engine and no openable student."""
    return make_bundle(tmp_path_factory.mktemp("bundle") / "small.refold")


@pytest.fixture
def fleet(tmp_path: Path, small: Bundle) -> Iterator[Fleet]:
    """A running service without workers that knows the small bundle."""
    with Fleet(tmp_path / "fleet", {"REFOLD_CLOUD_WORKERS__MODE": "none"}) as running:
        register(running.store, running.cloud._objects, small.path, [])
        yield running


@pytest.fixture(params=BACKENDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of every kind there is."""
    with fresh_database(request.param, tmp_path) as url:
        yield url
