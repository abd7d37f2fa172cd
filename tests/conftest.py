"""Shared by every test folder: torch on one thread, the data folder or a skip, and small real values of the core's types."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("refold", deadline=None)  # shared machines: nothing is timed in a test
settings.load_profile("refold")
os.environ.setdefault("OMP_NUM_THREADS", "1")
try:
    import torch

    torch.set_num_threads(1)
except ImportError:
    pass


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder REFOLD_DATA names; tests that need it are skipped, saying so, where it is unset."""
    folder = Path(os.environ.get("REFOLD_DATA", ""))
    if not (folder / "cifar10_test.u8.xz").is_file():
        pytest.skip("REFOLD_DATA is unset: this test needs the CIFAR-10 images and weights (shared/data)")
    return folder
