"""What an output correction is, and the arithmetic that all of them share."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["F32", "F64", "LIMIT_BYTES", "Correction", "direction"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
LIMIT_BYTES = 4 * 2**20  # of remembered vectors: a thousand classes must fit a small device too


class Correction(Protocol):
    """A state machine over one stream's frames, in order: no clock, no I/O, no labels. Not thread-safe.

    Attributes:
        name: as in the settings.
        calibrated: whether its probabilities mean as much as the engine's own, so that upload rules may be given them.
    """

    name: str
    calibrated: bool

    @property
    def memory_bytes(self) -> int:
        """Bytes of everything remembered, at most; they do not grow with the stream."""
        ...

    def observe(self, logits: F32, probabilities: F32) -> None:
        """Remembers one frame. Both float32 (C,), finite."""
        ...

    def corrected(self) -> F32:
        """Probabilities float32 (C,) of the frame observed last, of sum 1."""
        ...

    def forget(self) -> None:
        """Begins anew: another domain's logits are no neighbours."""
        ...


def direction(logits: F32) -> F32:
    """Logits float32 (C,) without their mean, which softmax does not see, at length 1; zeros where all are equal."""
    centred = logits - logits.mean(dtype=np.float64)
    length = float(np.sqrt(np.dot(centred, centred)))
    unit: F32 = (centred / length if length > 1e-12 else np.zeros_like(centred)).astype(np.float32)
    return unit
