"""What the demo runs on: CIFAR-10 with the networks that come with Refold, or digits with two that are trained on the spot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from demo.images import cifar10, digits
from demo.weather import SEVERE, Climate
from refold.errors import InputError, StorageError

__all__ = ["MEAN", "STD", "Assets", "Network", "cifar10_assets", "digits_assets"]

Say = Callable[[str], None]
WEIGHTS = Path(__file__).parent / "weights"
MODELS = Path(__file__).parent / "models.py"
MEAN = (0.485, 0.456, 0.406)  # of values 0..1; the networks were trained with these
STD = (0.229, 0.224, 0.225)
CALIBRATION = 512
STREAMED = 8000  # of the test pictures; examples/cifar10/train.py measures on the others
DIGITS_CLIMATE = Climate((0.75, 2.5), 0.4)  # black and white strokes: less fog and more noise than photographs stand


@dataclass(frozen=True)
class Network:
    """`spec` as the command line takes it (file.py:callable) and the `.npz` that fills it."""

    spec: str
    weights: Path


@dataclass(frozen=True)
class Assets:
    """images uint8 (N, 32, 32, 3) and labels int64 (N,) to stream; calibration of the same kind, disjoint from them."""

    name: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    calibration: tuple[NDArray[np.uint8], NDArray[np.int64]]
    student: Network
    teachers: tuple[Network, ...]
    climate: Climate = SEVERE

    def write_calibration(self, path: Path) -> Path:
        """An `.npz` of images and labels, as `refold export --calibration` reads it."""
        try:
            np.savez(path, images=self.calibration[0], labels=self.calibration[1])
        except OSError as e:
            raise StorageError(f"{path} cannot be written: {e.strerror}.") from e
        return path


def cifar10_assets(say: Say, seed: int) -> Assets:
    """Raises InputError when the pictures cannot be had (see demo.images) or the weights are missing."""
    student, teacher = WEIGHTS / "cifar10_student.npz", WEIGHTS / "cifar10_teacher.npz"
    for path in (student, teacher):
        if not path.is_file():
            raise InputError(f"{path} is missing: install Refold again, or make it with examples/cifar10/train.py.")
    images, labels = cifar10("test", say=say)
    pictures, truth = cifar10("train5k", say=say)
    some = np.random.default_rng(seed).permutation(len(pictures))[:CALIBRATION]
    return Assets(
        "CIFAR-10",
        images[:STREAMED],
        labels[:STREAMED],
        (pictures[some], truth[some]),
        Network(f"{MODELS}:resnet20", student),
        (Network(f"{MODELS}:resnet56", teacher),),
    )


def digits_assets(folder: Path, say: Say, seed: int) -> Assets:
    """scikit-learn's digits, with a student and a teacher trained now (about 20 s on one core) and kept in `folder`."""
    from demo.digits_training import train_digits

    train, test = digits("train"), digits("test")
    nets = []
    for name, epochs in (("digits_student", 6), ("digits_teacher", 6)):
        say(f"training {name.replace('_', ' ')} on {len(train[0]):,} digits")
        path = folder / f"{name}.npz"
        train_digits(name, train, path, epochs=epochs, seed=seed)
        nets.append(Network(f"{MODELS}:{name}", path))
    return Assets("digits", *test, (train[0][:CALIBRATION], train[1][:CALIBRATION]), nets[0], (nets[1],), DIGITS_CLIMATE)
