"""What the tests of fixed-point training share: pictures of four kinds with labels, and trainers that take a second."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import export_nets
import numpy as np

from export.capture import capture
from export.fixed_point.network import Network
from export.fixed_point.settings import Settings
from export.fixed_point.train import Trainer
from export.ir import Graph

QUICK = {"epochs": 3, "batch": 16, "accumulation": 2, "lookback": (3, 9), "refresh": 3}


def labelled(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures, and whether they are more red than green, plus 2 where they are blue."""
    images = export_nets.pictures(count, seed=seed)
    mean = images.mean((1, 2))
    return images, (mean[:, 0] > mean[:, 1]).astype(np.int64) + 2 * (mean[:, 2] > 128)


@cache
def captured(net: str) -> Graph:
    return capture(export_nets.make(net), export_nets.SIZE, export_nets.SIZE)


def trainer_of(settings: Settings, net: str = "residual", count: int = 128) -> Trainer:
    return Trainer(Network(captured(net), settings), export_nets.PREPROCESS, *labelled(count, 1), labelled(64, 2))
