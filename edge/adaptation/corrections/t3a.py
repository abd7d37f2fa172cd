"""T3A: class templates are made of the surest frames of each class (Iwasawa and Matsuo, NeurIPS 2021).

Every class has supports: a first one and the M frames predicted as it whose answers had the lowest entropy. Its template is the
sum of its supports at length 1, itself at length 1, and a frame's corrected logits are z · template_c.

The paper takes the rows of the last layer as first supports and its input as z. A device has logits only, whose last layer is
the identity: the first support of class c is its own axis, which always stays (the entropy of a row of weights has no
counterpart here). Until frames join it, the answer's order of classes is the engine's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge.adaptation.corrections.correction import F32, LIMIT_BYTES, direction

__all__ = ["T3A", "T3ASettings"]


@dataclass(frozen=True)
class T3ASettings:
    """Attributes:
        supports: M; the value FOA's comparison uses, within the paper's search of 1 to 100.
        limit_bytes: of all supports; with many classes M is as much smaller as it must be, and at least 1.
    """  # fmt: skip

    supports: int = 20
    limit_bytes: int = LIMIT_BYTES


class T3A:
    """Templates that follow one stream. Its confidences are known to be badly calibrated (specs/cema.md §3.3)."""

    name = "t3a"
    calibrated = False

    def __init__(self, class_count: int, settings: T3ASettings | None = None) -> None:
        s = settings or T3ASettings()
        self.supports = max(min(s.supports, s.limit_bytes // (4 * class_count**2)), 1)
        self._axes = np.stack([direction(row) for row in np.eye(class_count, dtype=np.float32)])
        self._vectors = np.zeros((class_count, self.supports, class_count), np.float32)
        self._entropies = np.empty((class_count, self.supports))
        self._templates = np.empty((class_count, class_count), np.float32)
        self.forget()

    @property
    def memory_bytes(self) -> int:
        arrays = (self._axes, self._vectors, self._entropies, self._templates)
        return sum(a.nbytes for a in arrays)

    def forget(self) -> None:
        self._entropies.fill(np.inf)
        self._templates[:] = self._axes
        self._newest = np.zeros(len(self._axes), np.float32)

    def observe(self, logits: F32, probabilities: F32) -> None:
        self._newest = (logits - logits.mean(dtype=np.float64)).astype(np.float32)
        label = int(probabilities.argmax())
        entropy = -float(np.dot(probabilities, np.log(probabilities + np.float32(1e-30))))
        place = int(self._entropies[label].argmax())
        if entropy >= self._entropies[label, place]:
            return
        self._entropies[label, place] = entropy
        self._vectors[label, place] = direction(logits)
        filled = np.isfinite(self._entropies[label])
        total = self._axes[label] + self._vectors[label, filled].sum(0)
        self._templates[label] = total / max(float(np.sqrt(total @ total)), 1e-12)

    def corrected(self) -> F32:
        values = (self._templates @ self._newest).astype(np.float64)
        powers = np.exp(values - values.max())
        out: F32 = (powers / powers.sum()).astype(np.float32)
        return out
