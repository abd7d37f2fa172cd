"""Bundles that the exporter made, with a statistics graph, and the small hand-written one without."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "export"))

import export_nets

from export.pictures import Pictures
from export.pipeline import export_model
from refold import Bundle


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("exported") / "residual.refold"
    images = export_nets.pictures(128)
    return export_model(export_nets.make("residual"), path, export_nets.PREPROCESS, Pictures(images, None)).bundle


@pytest.fixture(scope="session")
def foggy() -> list[np.ndarray]:
    return list((export_nets.pictures(48, seed=9) * 0.4 + 120).astype(np.uint8))
