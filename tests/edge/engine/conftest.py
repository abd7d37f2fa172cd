"""One small residual net exported for both runtimes, by export itself."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "export"))

import export_nets

from edge.engine import EngineFactory
from refold import Bundle


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    pytest.importorskip("ai_edge_litert")
    from export.pictures import Pictures
    from export.pipeline import Options, export_model

    path = tmp_path_factory.mktemp("both") / "both.refold"
    options = Options(("ort-x86-avx2", "litert"), "both", tuple("abcde"), observer="minmax")
    pictures = Pictures(export_nets.pictures(32), None)
    return export_model(export_nets.make("residual"), path, export_nets.PREPROCESS, pictures, options).bundle


@pytest.fixture(scope="session")
def litert(both: Bundle) -> EngineFactory:
    return EngineFactory(both, "litert")


@pytest.fixture(scope="session")
def ort(both: Bundle) -> EngineFactory:
    return EngineFactory(both, "ort-x86-avx2")


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return export_nets.pictures(12, seed=7)
