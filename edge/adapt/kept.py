"""The images of the present domain that a device keeps in memory, and how many independent ones they are worth."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from edge.adapt.features import Reference, image_features

__all__ = ["KeptImages", "blind", "independent"]

U8 = NDArray[np.uint8]
F64 = NDArray[np.float64]
NOTHING = 3.0  # grey levels of standard deviation
ALIKE = 0.5  # of the mean square by which calibration images differ (kinds of noise and blur: 0.63 to 1.1; still camera: 0.01)


def blind(image: U8) -> bool:
    """Whether an image, uint8 (H, W, 3), shows nothing but a sensor's noise: a lens cap, a wall, a white sky."""
    return float(image.std()) < NOTHING


class KeptImages:
    """At most `limit` images, uint8 (H, W, 3); the same image twice is kept once."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.clear()

    def clear(self) -> None:
        self._images: list[U8] = []
        self._features: list[F64] = []
        self._frames: list[int] = []
        self._digests: set[bytes] = set()

    def add(self, frame: int, image: U8) -> bool:
        """False when it is there already or there is no room."""
        digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
        if digest in self._digests or self.full:
            return False
        self._digests.add(digest)
        self._images.append(image)
        self._frames.append(frame)
        self._features.append(image_features(image))
        return True

    def __len__(self) -> int:
        return len(self._images)

    @property
    def full(self) -> bool:
        return len(self._images) >= self.limit

    @property
    def images(self) -> list[U8]:
        return list(self._images)

    def frames(self, first: int = 0) -> tuple[int, int]:
        """Numbers of the first, or a later, and the last frame kept."""
        return self._frames[min(first, len(self._frames) - 1)], self._frames[-1]

    def worth(self, reference: Reference) -> float:
        """Independent images that the kept ones are worth; see `independent`."""
        return independent(np.stack(self._features), reference)


def independent(values: F64, reference: Reference) -> float:
    """How many independent images a sequence is worth, 1 to its length.

    The mean of n neighbours with lag-one correlation r varies like that of n (1 - r) / (1 + r) independent images (AR(1);
    Priestley 1981, section 5.3.2). Images that differ far less from each other than calibration images do, as those of a camera
    that does not move, say as little about others: they count by how much they differ. Fog, blur and noise make images differ
    less as well, but hardly by half.

    Args:
        values: features in order, float64 (n, features).
    """
    n = len(values)
    if n < 2:
        return float(n)
    apart = values - values.mean(0)
    size = float(np.einsum("ij,jk,ik->", apart, reference.precision, apart))
    along = float(np.einsum("ij,jk,ik->", apart[1:], reference.precision, apart[:-1]))
    differ = min(size / ((n - 1) * values.shape[1]) / ALIKE, 1.0)
    correlation = min(max(along / size if size > 0 else 1.0, 0.0), 0.98)
    return 1.0 + float(n - 1) * float(differ) * (1 - correlation) / (1 + correlation)
