"""Probabilities and entropy of one frame's logits, without a dozen numpy calls where there are few classes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["softmax"]

FEW = 64  # classes below which Python's own floats are faster than arrays
F32 = NDArray[np.float32]


def softmax(logits: F32) -> tuple[F32, int, float]:
    """(probabilities float32 (classes,), most likely class, entropy in nats) of logits float32 (classes,).

    Entropy is ln Z - sum p (l - max l), which needs no logarithm per class. Logits that are not finite give NaN entropy.
    """
    if len(logits) <= FEW:
        values = logits.tolist()
        top = max(values)
        if not math.isfinite(top):
            return np.full(len(values), np.nan, np.float32), 0, math.nan
        powers = [math.exp(v - top) for v in values]
        total = sum(powers)
        share = 1.0 / total
        entropy = math.log(total) - sum([p * (v - top) for p, v in zip(powers, values, strict=True) if p]) * share
        return np.array([p * share for p in powers], np.float32), values.index(top), entropy
    index = int(logits.argmax())
    centred = logits - logits[index]
    powers_ = np.exp(centred)
    sum_ = float(powers_.sum())
    with np.errstate(invalid="ignore"):
        entropy = math.log(sum_) - float(powers_ @ centred) / sum_ if sum_ == sum_ else math.nan
    return powers_ / np.float32(sum_), index, entropy
