"""Probabilities and entropy of one frame's logits, without a dozen numpy calls where there are few classes."""

from __future__ import annotations

import math
from operator import mul

import numpy as np
from numpy.typing import NDArray

__all__ = ["softmax"]

FEW = 64  # classes below which Python's own floats are faster than arrays
F32 = NDArray[np.float32]


def softmax(logits: F32) -> tuple[F32, int, float]:
    """(probabilities float32 (classes,), most likely class, entropy in nats) of logits float32 (classes,).

    Entropy is ln Z - sum p (l - max l), which needs no logarithm per class. Logits that are not finite give NaN.
    """
    if len(logits) > FEW:
        return _of_many(logits)
    values = logits.tolist()
    top = max(values)
    if not (math.isfinite(top) and math.isfinite(sum(values))):
        return np.full(len(values), np.nan, np.float32), 0, math.nan
    centred = [v - top for v in values]
    powers = list(map(math.exp, centred))
    total = sum(powers)
    share = 1.0 / total
    entropy = math.log(total) - sum(map(mul, powers, centred)) * share
    return np.array([p * share for p in powers], np.float32), values.index(top), entropy


def _of_many(logits: F32) -> tuple[F32, int, float]:
    index = int(logits.argmax())
    centred = logits - logits[index]
    if not math.isfinite(float(centred.sum())):
        return np.full(len(logits), np.nan, np.float32), 0, math.nan
    powers = np.exp(centred)
    total = float(powers.sum())
    return powers / np.float32(total), index, math.log(total) - float(powers @ centred) / total
