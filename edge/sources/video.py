"""Video files and cameras through OpenCV, where it is installed."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge.sources.pictures import Skipped, fit
from edge.sources.source import Picture
from refold.errors import InputError, UsageError
from refold.imaging.files import kind_of
from refold.preprocess import Preprocess

__all__ = ["VideoSource"]


def _is_camera(path: Path) -> bool:
    """/dev/video0 and its like are cameras; a pipe or a socket, which OpenCV would wait for, is refused.

    Raises:
        UsageError: neither a file nor a device.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return False  # OpenCV says what is wrong
    if stat.S_ISCHR(mode):
        return True
    if kind := kind_of(mode):
        raise UsageError(f"{path} is {kind}, not a video: give a file, or camera:N.")
    return False


class VideoSource:
    """A file's frames in order, or a camera's as they come (`live`).

    Raises:
        UsageError: OpenCV is not installed, or cannot open the file or camera.
    """

    slow = True

    def __init__(self, origin: Path | int, preprocess: Preprocess) -> None:
        self.skipped = Skipped()
        self.live = isinstance(origin, int) or _is_camera(origin)
        self.replayed = not self.live
        self._name = f"camera:{origin}" if isinstance(origin, int) else origin.name
        self._preprocess = preprocess
        try:
            import cv2
        except ImportError as e:
            raise UsageError(f"{self._name} needs OpenCV: pip install opencv-python-headless.", code="no-opencv") from e
        self._cv2: Any = cv2
        self._capture: Any = cv2.VideoCapture(origin if isinstance(origin, int) else str(origin))
        if not self._capture.isOpened():
            raise UsageError(f"OpenCV cannot open {self._name}: is it a video or camera, and may this user read it?")

    def __iter__(self) -> Iterator[Picture | None]:
        number = 0
        while True:
            good, frame = self._capture.read()
            if not good:
                return
            name = f"{self._name}[{number}]"
            number += 1
            try:
                yield Picture(fit(self._cv2.cvtColor(frame, self._cv2.COLOR_BGR2RGB), self._preprocess), name)
            except InputError as e:
                self.skipped.add(name, e)

    def close(self) -> None:
        self._capture.release()
