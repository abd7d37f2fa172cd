"""One training of each kind, for every test that only looks at a finished one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fixed_point_nets import QUICK, trainer_of

from export.fixed_point.settings import Settings, for_integers
from export.fixed_point.train import Trainer


@pytest.fixture(scope="session")
def trained() -> Trainer:
    """In words of at most 8 bits."""
    trainer = trainer_of(for_integers(**QUICK))
    trainer.run()
    return trainer


@pytest.fixture(scope="session")
def trained_as_published() -> Trainer:
    trainer = trainer_of(Settings(**QUICK))
    trainer.run()
    return trainer
