"""Calibration pictures: a folder of images (a sub-folder for each class, or not) or an `.npz`; what cannot be used is named."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from refold.errors import InputError, UsageError
from refold.imaging import SUFFIXES, fit, is_image_name, read_image
from refold.preprocess import Preprocess, Resize

__all__ = ["SUFFIXES", "Pictures", "class_names", "image_files", "load_pictures", "read_picture"]

FEWEST_LEVELS = 8.0  # standard deviation over all pixels of a set below which it shows nothing
U8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Pictures:
    """images uint8 (N, H, W, 3); labels int64 (N,) or None; skipped: one sentence for each picture that could not be used.

    Attributes:
        folders: names of the sub-folders the labels were counted from, in order; empty where labels came otherwise.
        notes: one sentence for each thing that was given and could not be used as a label.
    """

    images: U8
    labels: NDArray[np.int64] | None
    skipped: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def class_names(text: str | None) -> list[str]:
    """What --classes says: names from `a,b,c` or from a file with one a line. Raises UsageError when the file is not text."""
    if not text:
        return []
    path = Path(text)
    if path.suffix in (".txt", ".names") or path.is_file():
        try:
            return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as e:
            raise UsageError(f"--classes: {path} cannot be read as text: {e}.") from e
    return [name.strip() for name in text.split(",") if name.strip()]


def load_pictures(
    source: Path, preprocess: Preprocess, limit: int = 512, classes: Sequence[str] = (), what: str = "calibration"
) -> Pictures:
    """Reads at most `limit` pictures, spread evenly over what is there.

    Args:
        what: the set's name in messages.

    Raises:
        InputError: nothing there, nothing usable, or every picture of one colour.
    """
    if source.is_dir():
        found = _from_folder(source, preprocess, limit, classes)
    elif source.is_file():
        found = _from_npz(source, preprocess, limit, what)
    else:
        raise InputError(f"There is no {what} set at {source}.", code="no-images")
    if not len(found.images):
        raise InputError(f"No {what} picture in {source} can be used: {found.skipped[0]}", code="no-images")
    flat = found.images.reshape(len(found.images), -1)
    if float(flat.std()) < 1e-9 or (len(flat) > 1 and float(flat.astype(np.float32).std(1).max()) < FEWEST_LEVELS / 8):
        raise InputError(
            f"The {len(found.images)} {what} pictures in {source} are each of one colour: ranges taken from them would be "
            "wrong for real pictures. Give pictures like those the device will see.",
            code="calibration-uniform",
        )
    return found


def _spread(count: int, limit: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(count, limit)).astype(np.int64))


def image_files(folder: Path) -> list[Path]:
    """Everything below a folder that is named as an image, directories left out; what is no file is named when it is read."""
    return sorted(p for p in folder.rglob("*") if is_image_name(p.name) and not p.is_dir())


def _from_folder(folder: Path, preprocess: Preprocess, limit: int, classes: Sequence[str]) -> Pictures:
    files = image_files(folder)
    if not files:
        raise InputError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}).", code="no-images")
    names = list(classes) or sorted({p.parent.name for p in files if p.parent != folder})
    images, labels, skipped = [], [], []
    for index in _spread(len(files), limit):
        file = files[int(index)]
        try:
            images.append(read_picture(file, preprocess))
        except InputError as e:
            skipped.append(e.message)
            continue
        labels.append(names.index(file.parent.name) if file.parent.name in names else -1)
    known = bool(labels) and min(labels) >= 0
    shape = (0, preprocess.height, preprocess.width, 3)
    notes: tuple[str, ...] = ()
    if not known and names:
        notes = (_unlabelled(folder, names, labels),)
    return Pictures(
        np.stack(images) if images else np.zeros(shape, np.uint8),
        np.asarray(labels, np.int64) if known else None,
        tuple(skipped),
        () if classes else tuple(names),
        notes,
    )


def _unlabelled(folder: Path, names: Sequence[str], labels: Sequence[int]) -> str:
    missing = sum(label < 0 for label in labels)
    return (
        f"The images in {folder} count as unlabelled: {missing} of {len(labels)} lie in no sub-folder named after a class "
        f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})."
    )


def read_picture(file: Path, preprocess: Preprocess) -> U8:
    """uint8 (height, width, 3) as the model takes it. Raises InputError when the file is not such a picture."""
    return read_image(file, preprocess, file.name)


def _from_npz(file: Path, preprocess: Preprocess, limit: int, what: str) -> Pictures:
    try:
        with file.open("rb") as f, np.load(f, allow_pickle=False) as archive:
            arrays = {k: archive[k] for k in archive.files}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as e:  # TypeError: a bare .npy
        raise InputError(f"The {what} set {file} cannot be read as .npz.", code="unreadable", detail=str(e)) from e
    name = "images" if "images" in arrays else next((k for k, a in arrays.items() if a.ndim == 4), "")
    if not name:
        raise InputError(f"{file} holds no array of pictures: name it `images`, uint8 (N, H, W, 3).", code="no-images")
    images = arrays[name]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise InputError(
            f"{name} in {file} is {images.dtype} {images.shape}; {what} pictures are uint8 (N, H, W, 3), RGB.",
            code="not-rgb",
        )
    labels, notes = _labels_of(file, arrays, len(images))
    index = _spread(len(images), limit) if len(images) else np.zeros(0, np.int64)
    images = images[index]
    if len(images) and (preprocess.resize is not Resize.EXACT or images.shape[1:3] != (preprocess.height, preprocess.width)):
        images = np.stack([fit(i, preprocess, f"{name} in {file.name}") for i in images])
    shown = (f"{file.name} is empty.",) if not len(images) else ()
    return Pictures(np.ascontiguousarray(images), None if labels is None else labels[index], shown, (), notes)


def _labels_of(file: Path, arrays: Mapping[str, np.ndarray], count: int) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """`labels` or `y`, whichever is one whole number for each image; else why they cannot be used."""
    notes = []
    for name in ("labels", "y"):
        if name not in arrays:
            continue
        given = arrays[name]
        whole = given.dtype.kind in "iu" or (given.dtype.kind == "f" and bool((given == np.rint(given)).all()))
        if given.shape == (count,) and whole:
            return given.astype(np.int64), ()
        notes.append(
            f"{name} in {file.name} is {given.dtype} {given.shape}, not one whole number for each of the {count} images: the "
            "images count as unlabelled."
        )
    return None, tuple(notes)
