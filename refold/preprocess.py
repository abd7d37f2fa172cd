"""From a picture's bytes to a model's input, the same on every side; its digest travels with every sample."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from refold.errors import BundleError, InputError, UsageError
from refold.v1 import manifest_pb2 as pb

__all__ = ["Preprocess", "Resize"]


class Resize(Enum):
    """Values are those of `refold.v1.Preprocess.Resize`; the resampling itself needs Pillow and sits in edge/sources."""

    EXACT = 1
    STRETCH = 2
    CENTRE_CROP = 3


@dataclass(frozen=True)
class Preprocess:
    """value = (pixel * scale - mean[c]) / std[c]; RGB, uint8 (height, width, 3) in, float32 (3, height, width) out."""

    width: int
    height: int
    scale: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    resize: Resize = Resize.EXACT
    resize_short: int = 0

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise UsageError(f"A model input of {self.width}x{self.height} pixels has no size; give both as positive numbers.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UsageError("Preprocessing needs three means and three standard deviations above 0 (red, green, blue).")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, 3) of a picture at the model's size."""
        return (self.height, self.width, 3)

    def table(self) -> NDArray[np.float32]:
        """The value of each of the 256 pixel codes in each channel: float32 (3, 256)."""
        codes = np.arange(256, dtype=np.float64)[None, :] * self.scale
        mean, std = (np.asarray(v, np.float64)[:, None] for v in (self.mean, self.std))
        return ((codes - mean) / std).astype(np.float32)

    @cached_property
    def _rows(self) -> tuple[NDArray[np.float32], ...]:
        return tuple(np.ascontiguousarray(row) for row in self.table())

    def apply(self, images: NDArray[np.uint8], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """uint8 (N, height, width, 3) or one (height, width, 3), to float32 (N, 3, height, width).

        Args:
            out: where to write, C-contiguous, of the result's shape; None makes a new array.

        Raises:
            InputError: another size, dtype or number of channels.
        """
        if images.ndim == 3:
            images = images[None]
        if images.dtype != np.uint8 or images.shape[1:] != (self.height, self.width, 3):
            raise InputError(
                f"The model takes {self.height}x{self.width} RGB pictures of 8 bits; this one is "
                f"{'x'.join(map(str, images.shape[1:]))} of {images.dtype}.",
                code="wrong-size",
            )
        if out is None:
            out = np.empty((images.shape[0], 3, self.height, self.width), np.float32)
        for image, planes in zip(images, out, strict=True):
            self.fill(image, planes)
        return out

    def fill(self, image: NDArray[np.uint8], planes: NDArray[np.float32]) -> None:
        """`apply` for one picture whose shape and type the caller has checked, into C-contiguous float32 (3, height, width)."""
        for c, row in enumerate(self._rows):  # plane by plane: `take` is fast only into contiguous memory
            row.take(image[:, :, c], out=planes[c], mode="clip")  # "raise" would write through a copy

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_pb().SerializeToString(deterministic=True)).hexdigest()

    def to_pb(self) -> pb.Preprocess:
        return pb.Preprocess(
            width=self.width,
            height=self.height,
            resize=self.resize.value,  # type: ignore[arg-type]
            resize_short=self.resize_short,
            scale=self.scale,
            mean=self.mean,
            std=self.std,
        )

    @classmethod
    def from_pb(cls, message: pb.Preprocess) -> Preprocess:
        if len(message.mean) != 3 or len(message.std) != 3 or message.resize not in (1, 2, 3):
            raise BundleError("The bundle's preprocessing is incomplete: export the model again.")
        r, g, b = message.mean
        sr, sg, sb = message.std
        return cls(
            message.width, message.height, message.scale, (r, g, b), (sr, sg, sb), Resize(message.resize), message.resize_short
        )
