"""AdaNPC: the nearest remembered frames vote (Zhang et al., ICML 2023, arXiv 2304.12566).

A frame's k nearest vectors of the memory, by cosine, vote for their labels with weights softmax(cosine / T); each class gets
1e-5 more, and what a frame was voted to be is remembered with it. Where the repository lets the memory grow without bound, the
oldest frame goes here.

The paper's memory begins with the training set's features and labels. A device has the calibration slice: its images, labelled
by the exported engine, and one vector per class, the class's own axis in the space of logits. These stay.

The paper adds a frame when the softmax of its votes is at least a threshold from {0, 0.25, 0.75, 1.1}. That softmax is at most
e / (e + C - 1), 0.23 for ten classes, so 0 is the only one of these thresholds at which ten classes learn anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge.adaptation.corrections.correction import F32, LIMIT_BYTES, direction

__all__ = ["AdaNPC", "AdaNPCSettings"]


@dataclass(frozen=True)
class AdaNPCSettings:
    """The repository's numbers for small images (yfzhang114/AdaNPC, `hparams_registry.py`).

    Attributes:
        memory: frames remembered; with many classes as many fewer as `limit_bytes` asks for.
        neighbours: k.
        temperature: T.
        limit_bytes: of remembered frames.
    """

    memory: int = 1000
    neighbours: int = 10
    temperature: float = 0.1
    limit_bytes: int = LIMIT_BYTES


class AdaNPC:
    """A memory of one stream's latest frames.

    Args:
        known: the exported engine's logits of the calibration images, float32 (N, C); None: there are none.
    """

    name = "adanpc"
    calibrated = False

    def __init__(self, class_count: int, settings: AdaNPCSettings | None = None, known: F32 | None = None) -> None:
        s = self.settings = settings or AdaNPCSettings()
        self.capacity = max(min(s.memory, s.limit_bytes // (4 * class_count)), 1)
        rows = np.eye(class_count, dtype=np.float32)
        if known is not None:
            rows = np.concatenate([rows, known[np.isfinite(known).all(1)][: self.capacity]])
        begun = np.stack([direction(row) for row in rows])
        self._vectors = np.concatenate([begun, np.zeros((self.capacity, class_count), np.float32)])
        self._labels = np.concatenate([rows.argmax(1), np.zeros(self.capacity, np.int64)])
        self._classes, self._begun = class_count, len(begun)
        self._seen = 0
        self._votes = np.full(class_count, 1.0 / class_count)

    @property
    def memory_bytes(self) -> int:
        return self._vectors.nbytes + self._labels.nbytes

    def forget(self) -> None:
        self._seen = 0

    def observe(self, logits: F32, probabilities: F32) -> None:
        vector = direction(logits)
        known = self._begun + min(self._seen, self.capacity)
        cosines = (self._vectors[:known] @ vector).astype(np.float64)
        k = min(self.settings.neighbours, known)
        nearest = np.argpartition(cosines, known - k)[known - k :]
        weights = np.exp((cosines[nearest] - cosines[nearest].max()) / self.settings.temperature)
        votes = np.bincount(self._labels[nearest], weights / weights.sum(), self._classes)
        self._votes = np.minimum(votes + 1e-5, 1.0)
        place = self._begun + self._seen % self.capacity
        self._vectors[place], self._labels[place] = vector, int(self._votes.argmax())
        self._seen += 1

    def corrected(self) -> F32:
        out: F32 = (self._votes / self._votes.sum()).astype(np.float32)
        return out
