"""Real images for the demo, the benchmarks and the tests: CIFAR-10 from REFOLD_DATA."""

from __future__ import annotations

import lzma
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["data_folder", "load_u8"]


def data_folder() -> Path | None:
    """The folder named by REFOLD_DATA, where it is set and holds the CIFAR-10 files."""
    value = os.environ.get("REFOLD_DATA")
    return Path(value) if value and (Path(value) / "cifar10_test.u8.xz").is_file() else None


def load_u8(path: Path, height: int = 32, width: int = 32) -> NDArray[np.uint8]:
    """Decodes the data folder's format: xz over channel, row and column differences. Returns uint8 (N, height, width, 3)."""
    with lzma.open(path) as f:
        r = np.frombuffer(f.read(), np.uint8).reshape(-1, 3, height, width)
    a = np.cumsum(np.cumsum(r, axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
    a[:, 0] += a[:, 1]
    a[:, 2] += a[:, 1]
    return np.ascontiguousarray(a.transpose(0, 2, 3, 1))
