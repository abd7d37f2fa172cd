"""Pictures straight into the integers: no float input, no quantisation of it, no transposition.

A model's first operators turn a float picture into codes: in ONNX Runtime `QuantizeLinear` and, for its layout, `Transpose`.
A pixel has 256 values, so those operators are a table of 3 x 256 codes. `Codes` applies it: as one multiply and add where these
give exactly the table's codes, which is tried for every entry, else by looking up. The factory compares answers with the float
path's before it lets any engine work this way.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refold.preprocess import Preprocess

__all__ = ["Codes", "Scratch"]

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


class Scratch:
    """Memory for one picture at a time; every thread has its own."""

    def __init__(self, height: int, width: int) -> None:
        n = height * width * 3
        self.values = np.empty(n, np.float32)
        self.places = np.empty(n, np.uint16)
        self.codes = np.empty((1, height, width, 3), np.uint8)
        self.flat = self.codes.reshape(n)


class Codes:
    """The input codes of 8-bit pictures.

    Args:
        scale, zero_point: of the model's input activation.
    """

    def __init__(self, preprocess: Preprocess, scale: float, zero_point: int) -> None:
        self.scale, self.zero_point = scale, zero_point
        table = preprocess.table()
        steps = np.rint(table / np.float32(scale)) + np.float32(zero_point)
        self.table: U8 = np.clip(steps, 0, 255).astype(np.uint8)
        pixels = preprocess.height * preprocess.width
        gain = (table[:, 255] - table[:, 0]) / np.float32(255 * scale)
        offset = table[:, 0] / np.float32(scale) + np.float32(zero_point + 0.5)
        line = np.arange(256, dtype=np.uint8)[None, :] * gain[:, None] + offset[:, None]
        self.affine = bool((line >= 0).all() and (line < 256).all() and np.array_equal(line.astype(np.uint8), self.table))
        self._gain, self._offset = np.tile(gain, pixels), np.tile(offset, pixels)
        self._rows = np.tile(np.array([0, 256, 512], np.uint16), 1 if self.affine else pixels)
        self._flat = self.table.reshape(-1)

    def fill(self, image: U8, scratch: Scratch) -> None:
        """Puts the codes of one C-contiguous picture, uint8 (height, width, 3), into `scratch.codes`."""
        pixels = image.reshape(-1)
        if self.affine:
            np.multiply(pixels, self._gain, out=scratch.values)
            np.add(scratch.values, self._offset, out=scratch.values)
            np.copyto(scratch.flat, scratch.values, casting="unsafe")  # truncates: the offset has a half in it
        else:
            np.add(pixels, self._rows, out=scratch.places)
            self._flat.take(scratch.places, out=scratch.flat, mode="clip")
