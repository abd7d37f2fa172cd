"""Labelled streams of corrupted CIFAR-10 test pictures, in a seeded order, kept between runs.

Where `REFOLD_CIFAR10C` names a folder with the published CIFAR-10-C (`gaussian_noise.npy`, ..., uint8 (50000, 32, 32, 3), five
severities of the 10,000 test pictures), its bytes are used; else `bench.corrupt` makes them.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.corrupt import NAMES, SEVERITIES, U8, corrupt
from demo.images import cifar10
from refold.atomic import write_atomically
from refold.errors import InputError, RefoldError, UsageError

__all__ = ["Stream", "cache_folder", "published_folder", "stream"]

TEST_PICTURES = 10_000
GENERATION = 1  # raise it when a recipe changes: kept streams of the old one are then no longer read


@dataclass(frozen=True, eq=False)
class Stream:
    """Frames in the order a device sees them.

    Attributes:
        name: the corruption, or "clean".
        images: uint8 (N, 32, 32, 3).
        labels: int64 (N,).
        index: int64 (N,), which test pictures they are.
        published: True when the bytes are those of the published CIFAR-10-C.
    """

    name: str
    severity: int
    images: U8
    labels: NDArray[np.int64]
    index: NDArray[np.int64]
    published: bool = False

    def __len__(self) -> int:
        return len(self.images)


def stream(name: str, count: int, *, severity: int = 5, seed: int = 0) -> Stream:
    """The first `count` of the 10,000 test pictures in a shuffle of the corruption's own, corrupted.

    Raises:
        UsageError: unknown name or severity, or more than 10,000 pictures asked for.
        InputError: CIFAR-10 cannot be had, or a published file is not what its name says.
    """
    if name != "clean" and name not in NAMES:
        raise UsageError(f"There is no corruption {name!r}; there are clean, {', '.join(NAMES)}.")
    if severity not in SEVERITIES or not 0 < count <= TEST_PICTURES:
        raise UsageError(f"A stream has severity 1 to 5 and 1 to {TEST_PICTURES} pictures, not {severity} and {count}.")
    clean, labels = _test_pictures()
    order = np.random.default_rng([seed, *name.encode()]).permutation(TEST_PICTURES)[:count]
    folder = published_folder()
    if name == "clean":
        images, published = clean[order], False
    elif folder is not None:
        images, published = _published(folder, name, severity, order), True
    else:
        images, published = _kept(name, severity, seed, clean[order]), False
    return Stream(name, severity, images, labels[order], order, published)


def published_folder() -> Path | None:
    """The folder with the published `.npy` files, from REFOLD_CIFAR10C; None when that is not set."""
    named = os.environ.get("REFOLD_CIFAR10C")
    return Path(named) if named else None


def cache_folder() -> Path:
    """Where made streams are kept: $XDG_CACHE_HOME/refold/streams, else ~/.cache/refold/streams."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "refold" / "streams"


@cache
def _test_pictures() -> tuple[U8, NDArray[np.int64]]:
    return cifar10("test")


def _published(folder: Path, name: str, severity: int, order: NDArray[np.int64]) -> U8:
    path = folder / f"{name}.npy"
    try:
        pictures = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as e:
        raise InputError(f"The published CIFAR-10-C file {path} cannot be read: {e}. Unset REFOLD_CIFAR10C to make one.") from e
    if pictures.shape != (5 * TEST_PICTURES, 32, 32, 3) or pictures.dtype != np.uint8:
        raise InputError(f"{path} is not a file of the published CIFAR-10-C: it holds {pictures.dtype} {pictures.shape}.")
    return np.asarray(pictures[(severity - 1) * TEST_PICTURES + order])


def _kept(name: str, severity: int, seed: int, clean: U8) -> U8:
    key = hashlib.sha256(f"{GENERATION} {name} {severity} {seed}".encode())
    key.update(np.ascontiguousarray(clean).data)
    path = cache_folder() / f"{name}-{severity}-{key.hexdigest()[:24]}.npy"
    try:
        kept = np.load(path, allow_pickle=False)
        if kept.shape == clean.shape and kept.dtype == np.uint8:
            return np.asarray(kept)
    except (OSError, ValueError, EOFError):
        pass  # not made yet, or cut short by a kill: make it
    made = corrupt(name, severity, clean, seed)
    content = io.BytesIO()
    np.save(content, made, allow_pickle=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, [content.getvalue()])
    except (OSError, RefoldError):
        pass  # no room: only the next run pays
    return made
