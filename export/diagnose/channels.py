"""Output channels that the integers lose: their error measured against their own range, not against the whole output's.

An output that puts boxes of 0 to 320 beside scores of 0 to 1 has a small error as a whole although every score is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from export.diagnose.finding import Finding

__all__ = ["LOST", "channel_errors", "lost_channels", "ranges_told"]

F32 = NDArray[np.float32]
LOST = 0.5  # root mean square error over standard deviation: less than 6 dB of the channel is left
CONSTANT = 1e-5  # standard deviation over the channel's size below which it tells nothing that could be lost
NAMED = 4


def channel_errors(logits: F32, truth: F32) -> NDArray[np.float64]:
    """Each output channel's root mean square error over its own standard deviation: float64 (channels,).

    Args:
        logits, truth: float32 (N, channels). A channel that is the same for every image has an error of 0.
    """
    spread, size = truth.std(0).astype(np.float64), np.abs(truth).max(0).astype(np.float64)
    error = np.sqrt(np.mean((logits.astype(np.float64) - truth) ** 2, 0))
    live = spread > CONSTANT * np.maximum(size, 1e-30)
    return np.asarray(np.where(live, error / np.where(live, spread, 1.0), 0.0))


def lost_channels(target: str, logits: F32, truth: F32) -> Iterator[Finding]:
    """Args:
        logits, truth: float32 (N, channels), of a target's engine and of the float model.
    """  # fmt: skip
    errors = channel_errors(logits, truth)
    lost = np.flatnonzero(errors > LOST)
    if len(truth) < 2 or not len(lost):
        return
    yield Finding(
        "lost-channels",
        f"{target}: {len(lost)} of {len(errors)} outputs ({ranges_told(lost.tolist())}) are lost in integers: their error is "
        f"{float(np.median(errors[lost])):.2f} of their own spread over the calibration images. Give the layers before them "
        "more bits, or keep them in float (--keep-float).",
        {"lost": float(len(lost)), "outputs": float(len(errors)), "error": float(np.median(errors[lost]))},
    )


def ranges_told(numbers: Sequence[int]) -> str:
    """`3 to 82, 85` for sorted numbers; a long list ends in dots."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    told = [f"{a}" if a == b else f"{a} to {b}" for a, b in runs[:NAMED]]
    return ", ".join(told) + (", ..." if len(runs) > NAMED else "")
