"""One small residual net exported once, for every test that only looks at a finished bundle."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import export_nets

from export.pictures import Pictures
from export.pipeline import Exported, Options, export_model


@pytest.fixture(scope="session")
def x() -> np.ndarray:
    return export_nets.PREPROCESS.apply(export_nets.pictures(24, seed=5))


@pytest.fixture(scope="session")
def residual(tmp_path_factory) -> Exported:
    path = tmp_path_factory.mktemp("bundle") / "residual.refold"
    pictures = Pictures(export_nets.pictures(64), np.arange(64) % export_nets.CLASSES)
    options = Options(name="residual", classes=tuple("abcde"))
    return export_model(export_nets.make("residual"), path, export_nets.PREPROCESS, pictures, options)


@pytest.fixture(scope="session")
def npz(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "calibration.npz"
    np.savez(path, images=export_nets.pictures(32))
    return path
