"""The account of images that could not be used. How one is read is refold/imaging's, the same as for calibration."""

from __future__ import annotations

import logging

from refold.errors import InputError
from refold.imaging import SUFFIXES, fit
from refold.imaging import read_image as load_picture

__all__ = ["SUFFIXES", "Skipped", "fit", "load_picture"]

log = logging.getLogger(__name__)
SAID = 20  # skipped pictures named in the log one by one; then every hundredth


class Skipped:
    """Counts and names pictures that could not be used. `last` is the newest one's name and reason."""

    def __init__(self) -> None:
        self.count = 0
        self.last = ""

    def add(self, name: str, error: InputError) -> None:
        self.count += 1
        self.last = f"{name}: {error.message}"
        if self.count <= SAID or self.count % 100 == 0:
            log.warning("Skipped picture %d, %s", self.count, self.last)
