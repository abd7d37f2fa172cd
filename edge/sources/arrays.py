"""Pictures of an .npz (key `images`) or .npy file: uint8 (N, height, width, 3). Never unpickles."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge.sources.pictures import Skipped, fit
from edge.sources.source import Picture
from refold.errors import InputError
from refold.imaging import open_regular
from refold.preprocess import Preprocess, Resize

__all__ = ["ArraySource"]


class ArraySource:
    """Raises InputError when the file is damaged or its pictures are not what the model takes."""

    live = slow = False
    replayed = True

    def __init__(self, path: Path, preprocess: Preprocess) -> None:
        self.skipped = Skipped()
        self._preprocess = preprocess
        self._name = path.name
        try:
            with open_regular(path) as f:
                if path.suffix.lower() == ".npy":
                    images = np.load(path, allow_pickle=False, mmap_mode="r")
                else:
                    with np.load(f, allow_pickle=False) as archive:
                        images = archive["images"]
        except InputError as e:
            raise InputError(f"{path} {e.message}", code=e.code) from e
        except KeyError:
            raise InputError(f"{path} has no array called images.") from None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
            raise InputError(f"{path} cannot be read as an array file: {e}.", code="unreadable") from e
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise InputError(
                f"The images of {path} are {'x'.join(map(str, images.shape))} of {images.dtype}; "
                "wanted is uint8 of shape (pictures, height, width, 3), RGB.",
                code="not-rgb",
            )
        if preprocess.resize is Resize.EXACT and images.shape[1:3] != (preprocess.height, preprocess.width):
            raise InputError(
                f"The images of {path} are {images.shape[2]}x{images.shape[1]}, "
                f"the model takes exactly {preprocess.width}x{preprocess.height}.",
                code="wrong-size",
            )
        self._images = images

    def __iter__(self) -> Iterator[Picture | None]:
        p, name = self._preprocess, self._name
        as_they_are = p.resize is not Resize.CENTRE_CROP and self._images.shape[1:3] == (p.height, p.width)
        for i, image in enumerate(self._images):
            yield Picture(image if as_they_are else fit(np.asarray(image), p), f"{name}[{i}]")

    def close(self) -> None:
        return None
