"""Softmax over rows of logits, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["softmax_rows"]


def softmax_rows(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Probabilities float64 over the last axis of logits (..., C)."""
    wide = values.astype(np.float64)
    powers = np.exp(wide - wide.max(-1, keepdims=True))
    out: NDArray[np.float64] = powers / powers.sum(-1, keepdims=True)
    return out
