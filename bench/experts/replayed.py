"""The words' trace through `edge.experts.replay`, without a model: every policy at every size, one that is told what the trace
is drawn from, and Belady's."""

from __future__ import annotations

import numpy as np

from bench.experts.checkpoint import Words
from bench.experts.informed import Informed, outlook
from bench.experts.shape import Shape
from bench.experts.trace import Routing, Text
from bench.result import Cell
from edge.experts.policies import Layout
from edge.experts.replay import belady, compare, replay
from edge.experts.trace import Trace

__all__ = ["clairvoyant", "curves"]

SHARES = (0.125, 0.1875, 0.25, 0.375, 0.5, 0.75)
SKIP = 48
TOKENS = 400


def as_trace(trace: Routing, shape: Shape) -> Trace:
    tokens = [[(layer, row[layer].astype(np.int64)) for layer in range(shape.layers)] for row in trace]
    return Trace(tuple(range(shape.layers)), shape.experts, shape.top_k, tokens)


def clairvoyant(trace: Routing, shape: Shape, slots: int, warm: int) -> float:
    """Hit rate after `warm` tokens of the rule that knows the future, `slots` records shared by all layers."""
    return belady(as_trace(trace, shape), np.ones(shape.routed, np.int64), slots, skip=warm).hit_rate


def curves(words: Words, quick: bool) -> list[dict[str, Cell]]:
    """One row for each policy and number of slots."""
    shape, sizes = words.shape, np.ones(words.shape.routed, np.int64)
    told = as_trace(words.trace[: TOKENS // 4 if quick else TOKENS], shape)
    layout = Layout(told.layers, shape.experts)
    frequency = np.array([words.frequency.get((n // layout.experts, n % layout.experts), 0.0) for n in range(layout.count)])
    known = outlook(Text(shape.layers, shape.experts, words.seed), len(told), shape.top_k)
    out: list[dict[str, Cell]] = []
    for share in SHARES:
        slots = max(int(share * shape.routed), shape.top_k + 1)
        found = compare(told, sizes, slots, frequency=frequency, skip=SKIP)
        found[Informed.name] = replay(told, sizes, slots, Informed(layout, known), skip=SKIP)
        out += [{"policy": name, "slots": slots, "hit": round(of.hit_rate, 4)} for name, of in found.items()]
    return out
