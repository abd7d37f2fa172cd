"""Video files and cameras through OpenCV, where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge.sources.pictures import Skipped, fit
from edge.sources.source import Picture
from refold.errors import InputError, UsageError
from refold.preprocess import Preprocess

__all__ = ["VideoSource"]


class VideoSource:
    """A file's frames in order, or a camera's as they come (`live`).

    Raises:
        UsageError: OpenCV is not installed, or cannot open the file or camera.
    """

    slow = True

    def __init__(self, origin: Path | int, preprocess: Preprocess) -> None:
        self.skipped = Skipped()
        self.live = isinstance(origin, int)
        self._name = f"camera:{origin}" if self.live else Path(origin).name  # type: ignore[arg-type]
        self._preprocess = preprocess
        try:
            import cv2
        except ImportError as e:
            raise UsageError(f"{self._name} needs OpenCV: pip install opencv-python-headless.", code="no-opencv") from e
        self._cv2: Any = cv2
        self._capture: Any = cv2.VideoCapture(origin if self.live else str(origin))
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
