"""Which guesses are worth a read: a confidence that is learnt, not believed, against a threshold.

Guesses come from the model's own gate, run ahead on the hidden state of now, or from the path table. Either says how sure it
is in a currency of its own (a softmax weight of 0.1 may mean certainty among 64 experts). So each guess is put into a bin by
what it claims, or by its rank where it claims nothing, and the bin by how often such guesses came true; guesses that were not
read count too. A read pays when it is likelier to be used than the record it drives out, whose chance is the hit rate of a
cache: 0.3 or so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge.experts.policies import Layout

__all__ = ["ReadAhead"]

BINS = 16
BELIEF = 4.0  # tokens that a claim counts for before it was tried
BY_RANK = 0.8  # what a first guess without a claim is taken for


class ReadAhead:
    """Not thread-safe: the pager calls it under its lock.

    Args:
        limit: bytes of read-ahead under way at most, 0 for none.
        threshold: least share of such guesses that came true.
    """

    def __init__(self, layout: Layout, top_k: int, limit: int, threshold: float) -> None:
        self.layout, self.top_k, self.limit, self.threshold = layout, top_k, limit, threshold
        shape = (2, len(layout.layers), BINS)  # claimed, by rank
        self._seen: NDArray[np.float64] = np.zeros(shape)
        self._true: NDArray[np.float64] = np.zeros(shape)
        self._open: dict[int, tuple[int, list[int], list[int]]] = {}
        self._hint_at: dict[int, int] = {}
        self._first = next((p for p, layer in enumerate(layout.layers) if layer >= 0), 0)

    def following(self, position: int) -> int:
        """The position that asks next; after the last, the first decoder layer's."""
        return position + 1 if position + 1 < len(self.layout.layers) else self._first

    def hinted(self, position: int, token: int) -> None:
        """The model gave a hint for this layer."""
        self._hint_at[position] = token

    def hints_come(self, position: int, token: int) -> bool:
        """The model gives hints for this layer, so the path table may be silent."""
        return token - self._hint_at.get(position, -10) <= 1

    def choose(self, position: int, ids: Sequence[int], confidence: Sequence[float] | None = None) -> list[int]:
        """Of these guesses, the likeliest first, those worth a read; all are remembered to learn from."""
        few = list(ids[: 2 * self.top_k])
        if confidence is None:
            kind, bins = 1, [min(r * BINS // (2 * self.top_k), BINS - 1) for r in range(len(few))]
            claims = [BY_RANK * (1 - r / (2 * self.top_k)) for r in range(len(few))]
        else:
            claims = [min(max(float(c), 0.0), 1.0) for c in confidence[: len(few)]]
            kind, bins = 0, [min(int(c * BINS), BINS - 1) for c in claims]
        self._open[position] = (kind, few, bins)
        seen, true = self._seen[kind, position], self._true[kind, position]
        return [
            i
            for i, b, claim in zip(few, bins, claims, strict=False)
            if (true[b] + BELIEF * claim) / (seen[b] + BELIEF) >= self.threshold
        ]

    def asked(self, position: int, wanted: set[int]) -> None:
        """The router has spoken: what was guessed is scored."""
        told = self._open.pop(position, None)
        if told is not None:
            kind, ids, bins = told
            for i, b in zip(ids, bins, strict=False):
                self._seen[kind, position, b] += 1
                self._true[kind, position, b] += i in wanted
