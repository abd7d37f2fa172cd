"""How near to Belady any policy can come on this trace: one that is told what the trace is drawn from.

It knows the static likes, the topic and the word that all layers see, at every moment, and all constants; only the noise and
what has not been drawn yet are hidden from it. It evicts what it expects to be used furthest from now. A policy that sees no
more than requests has to guess all this.
"""

from __future__ import annotations

import numpy as np
import torch

from bench.experts.trace import F64, Text
from edge.experts.policies import Layout, Policy

__all__ = ["Informed", "Outlook", "outlook"]

AHEAD = 24  # tokens looked ahead; what is later goes on as the last of them

Outlook = list[tuple[F64, F64]]


def outlook(text: Text, tokens: int, top_k: int) -> Outlook:
    """Of each token from the first: expected tokens until each expert's next use, (layers, experts) each: with this token
    still to come, and without it."""
    out = []
    for _ in range(tokens):
        text.token()
        wait = 1 / _chance(*text.outlook(AHEAD), top_k)
        for ahead in range(AHEAD - 1, 0, -1):
            chance = _chance(*text.outlook(ahead), top_k)
            wait = (1 - chance) * (1 + wait)
        out.append(((1 - _chance(*text.outlook(0), top_k)) * (1 + wait), 1 + wait))
    return out


def _chance(mean: F64, spread: float, top_k: int) -> F64:
    """That an expert is among the top k of its layer: above the threshold that top k are expected above."""
    low, high = (np.full((len(mean), 1), edge) for edge in (-8.0, 8.0))
    for _ in range(24):
        middle = (low + high) / 2
        many = _above(mean, middle, spread).sum(1, keepdims=True) > top_k
        low, high = np.where(many, middle, low), np.where(many, high, middle)
    return np.clip(_above(mean, low, spread), 1e-9, 1 - 1e-9)


def _above(mean: F64, threshold: F64, spread: float) -> F64:
    return np.asarray(torch.special.ndtr(torch.from_numpy((mean - threshold) / spread)).numpy())


class Informed(Policy):
    """Worth: minus the layers that are expected to run until the next use. A trace's first token is the outlook's first."""

    name = "informed"

    def __init__(self, layout: Layout, told: Outlook) -> None:
        super().__init__(layout, np.zeros(layout.count))
        self._told, self._token = told, 0

    def token(self) -> None:
        self._token += 1

    def worth(self, position: int) -> F64:
        coming, after = self._told[self._token]
        cycle, where = len(self.layout.layers), np.arange(len(self.layout.layers))[:, None]
        away = np.where(where > position, coming, after) * cycle + where - position
        return np.asarray(-away.reshape(-1), np.float64)
