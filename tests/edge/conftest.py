"""A small real bundle for the device's tests, written once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from small_nets import residual_bundle

from edge.engine import EngineFactory
from refold import Bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return residual_bundle(tmp_path_factory.mktemp("bundle") / "residual.refold")


@pytest.fixture(scope="session")
def factory(bundle: Bundle) -> EngineFactory:
    return EngineFactory(bundle)
