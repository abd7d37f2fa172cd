"""What every row of the adaptation benchmark is: something that predicts a stream frame by frame, and adapts while it does."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bench.adaptation.nets import to_input

__all__ = ["BatchMethod", "Log", "Method"]

Log = Mapping[str, float]


class Method(Protocol):
    """A method in its state after all frames seen so far; a fresh object knows only the source domain."""

    def run(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], Log]:
        """Predicts the frames in order. A frame's prediction is made before that frame teaches anything.

        Args:
            images: uint8 (N, 32, 32, 3); labels: int64 (N,), for the rows that say they use them.

        Returns:
            predictions int64 (N,), and a log of this call: `frames_uploaded`, `bytes_up`, `bytes_down` and what else it counts.
        """
        ...


class BatchMethod:
    """A method that sees the stream in batches: subclasses answer one batch of logits and adapt."""

    batch = 200

    def run(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], Log]:
        self.counts: dict[str, float] = {"frames_uploaded": 0, "bytes_up": 0, "bytes_down": 0}
        predictions = []
        for start in range(0, len(images), self.batch):
            part = slice(start, start + self.batch)
            logits = self.step(to_input(images[part]), torch.from_numpy(labels[part]))
            predictions.append(logits.argmax(1).numpy())
        return np.concatenate(predictions), dict(self.counts)

    @abstractmethod
    def step(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes) of the batch as it was when it came in; adapts on it after."""
