"""Labelled pictures, read as they are needed: a folder with a sub-folder for each class, or an `.npz` of images and labels.

Order, augmentation and everything else that is drawn depend on the seed and the step alone, so that a resumed training sees
exactly what an uninterrupted one would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from export.pictures import image_files, load_pictures, read_picture
from refold.errors import InputError
from refold.imaging import FORMATS, open_regular
from refold.preprocess import Preprocess

__all__ = ["Labelled", "Split", "augmented", "load_labelled", "order_of"]

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
EVERYTHING = 2**40


@dataclass(frozen=True)
class Labelled:
    """labels int64 (N,); read: indices to uint8 (n, H, W, 3)."""

    labels: I64
    read: Callable[[I64], U8]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def digest(self) -> str:
        """Of the labels, in order: tells one set from another at no cost."""
        return hashlib.sha256(np.ascontiguousarray(self.labels, np.int64).tobytes()).hexdigest()

    def batches(self, preprocess: Preprocess, index: I64, size: int) -> Iterator[Tensor]:
        """Model inputs float32 (n, 3, H, W), n at most `size`, never 1: a norm in train mode needs two."""
        parts = [index[i : i + size] for i in range(0, len(index), size)]
        if len(parts) > 1 and len(parts[-1]) == 1:
            parts[-2:] = [np.concatenate(parts[-2:])]
        for part in parts:
            yield torch.from_numpy(preprocess.apply(self.read(part)))


@dataclass(frozen=True)
class Split:
    """Indices: train to learn from, held to measure on; both int64, disjoint."""

    train: I64
    held: I64

    @classmethod
    def of(cls, labels: I64, seed: int, share: float = 0.1, most: int = 2000) -> Split:
        """`share` of each class is held out, `most` in all."""
        rng = np.random.default_rng((seed, 1))
        share = min(share, most / len(labels))
        held: list[I64] = []
        for label in np.unique(labels):
            own = rng.permutation(np.flatnonzero(labels == label))
            held.append(own[: max(1, round(share * len(own)))] if len(own) > 1 else own[:0])
        out = np.sort(np.concatenate(held))
        return cls(np.setdiff1d(np.arange(len(labels)), out), out)


def load_labelled(source: Path, preprocess: Preprocess, classes: Sequence[str] = ()) -> Labelled:
    """Raises InputError when there is nothing usable or there are no labels."""
    if source.is_dir():
        return _folder(source, preprocess, list(classes))
    found = load_pictures(source, preprocess, EVERYTHING, classes)
    if found.labels is None:
        raise InputError(
            f"{source} holds no labels: an elastic training needs the array `labels`, a whole number for each picture.",
            code="no-labels",
        )
    images = found.images
    return _checked(Labelled(found.labels, lambda index: images[index]), source)


def _folder(folder: Path, preprocess: Preprocess, names: list[str]) -> Labelled:
    files = [p for p in image_files(folder) if p.parent != folder]
    names = names or sorted({p.parent.name for p in files})
    unknown = next((p for p in files if p.parent.name not in names), None)
    if not files or unknown is not None:
        raise InputError(
            f"{unknown.parent} is not the name of a class." if unknown else
            f"{folder} holds no sub-folder of pictures: an elastic training needs one for each class.", code="no-labels",
        )  # fmt: skip
    for file in files:  # the header only: a bad picture must not end a training that has run for hours
        try:
            with open_regular(file) as opened, Image.open(opened, formats=FORMATS):
                pass
        except (InputError, OSError, ValueError, SyntaxError) as e:
            raise InputError(f"{file} cannot be read as a picture: remove or repair it.", code="unreadable") from e
    labels = np.asarray([names.index(p.parent.name) for p in files], np.int64)
    return _checked(Labelled(labels, lambda index: np.stack([read_picture(files[int(i)], preprocess) for i in index])), folder)


def _checked(data: Labelled, source: Path) -> Labelled:
    if len(data) < 8 or len(np.unique(data.labels)) < 2 or data.labels.min() < 0:
        raise InputError(f"{source}: an elastic training needs at least 8 pictures of at least 2 classes.", code="no-labels")
    return data


def order_of(train: I64, batch: int, seed: int, step: int) -> I64:
    """The pictures of one step: consecutive pieces of a new permutation in each epoch, short last pieces left out."""
    batch = min(batch, len(train))
    epoch, place = divmod(step, len(train) // batch)
    order = np.random.default_rng((seed, 2, epoch)).permutation(train)
    return order[place * batch : (place + 1) * batch]


def augmented(images: U8, rng: np.random.Generator) -> U8:
    """Padded by an eighth with black and cropped at random, half of them mirrored (He et al. 2016, section 4.2)."""
    n, height, width, _ = images.shape
    top, left = -(-height // 8), -(-width // 8)
    padded = np.pad(images, ((0, 0), (top, top), (left, left), (0, 0)))
    rows, columns = rng.integers(0, 2 * top + 1, n), rng.integers(0, 2 * left + 1, n)
    mirrored = np.less(rng.random(n), 0.5)
    out = np.empty_like(images)
    for i, flip in enumerate(mirrored):
        crop = padded[i, rows[i] : rows[i] + height, columns[i] : columns[i] + width]
        out[i] = crop[:, ::-1] if flip else crop
    return out
