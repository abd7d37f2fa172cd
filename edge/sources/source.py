"""The seam between a source and the stream, and how a source is named on a command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edge.sources.pictures import Skipped
from refold.errors import UsageError
from refold.imaging import is_image_name
from refold.imaging.files import kind_of
from refold.preprocess import Preprocess

__all__ = ["NoSource", "Picture", "Source", "open_source"]


class Picture(NamedTuple):
    """uint8 (height, width, 3) of the model's size, and where it is from."""

    image: NDArray[np.uint8]
    name: str


class Source(Protocol):
    """Iterated by one thread.

    Attributes:
        skipped: pictures that could not be used.
        live: pictures come whether or not anybody is ready; late ones are dropped and counted.
        replayed: pictures wait for us: a file's, an array's, a folder's as it is. Not a watched folder's or a camera's.
        slow: getting one takes longer than a queue's hand-over, so that reading ahead pays.
    """

    skipped: Skipped
    live: bool
    replayed: bool
    slow: bool

    def __iter__(self) -> Iterator[Picture | None]:
        """None when there is nothing at the moment; the caller comes back soon."""
        ...

    def close(self) -> None: ...


class NoSource:
    """Nothing ever: requests over the network drive the daemon."""

    live = replayed = slow = False

    def __init__(self) -> None:
        self.skipped = Skipped()

    def __iter__(self) -> Iterator[Picture | None]:
        while True:
            yield None

    def close(self) -> None:
        return None


def open_source(name: str, preprocess: Preprocess, *, watch: bool = False) -> Source:
    """Opens a folder, an .npz or .npy, a video, `camera:N`, or `none`.

    Args:
        watch: of a folder: goes on with pictures that arrive later.

    Raises:
        UsageError: nothing of the kind, or OpenCV is wanted and not installed.
        InputError: an array file that does not fit the model.
    """
    from edge.sources.arrays import ArraySource
    from edge.sources.folder import FolderSource
    from edge.sources.video import VideoSource

    if name == "none":
        return NoSource()
    path = Path(name)
    if name.startswith("camera:"):
        number = name.partition(":")[2]
        if not number.isdigit():
            raise UsageError(f"{name!r} names no camera; write camera:0, camera:1 and so on.")
        return VideoSource(int(number), preprocess)
    if path.is_dir():
        return FolderSource(path, preprocess, watch=watch)
    if not path.exists():
        raise UsageError(f"There is no source at {name}: give a folder of images, an .npz, a video, camera:N or none.")
    if path.suffix.lower() in (".npz", ".npy"):
        return ArraySource(path, preprocess)
    if is_image_name(path.name):
        if kind := kind_of(path.stat().st_mode):
            raise UsageError(f"{path} is {kind}, not a file: give an image, a folder of images, an .npz, a video or camera:N.")
        return FolderSource(path.parent, preprocess, only=path.name)
    return VideoSource(path, preprocess)
