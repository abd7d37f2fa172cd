"""A tiny random checkpoint of every family, made by transformers itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("transformers")

import tiny_families


@pytest.fixture(scope="session")
def lm_data() -> Path:
    folder = Path(os.environ.get("REFOLD_DATA", "")) / "lm"
    if not (folder / "tiny_mixtral" / "config.json").is_file():
        pytest.skip("REFOLD_DATA is unset: this test needs the trained model of shared/data/lm")
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Family to folder, as published: per-expert names."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: tiny_families.save(name, root / name) for name in tiny_families.CONFIGS}


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(32, 127)) * 8)
    return path
