"""Which experts each token uses: a generator with a published seed, calibrated to what was measured on OLMoE-1B-7B.

    score of expert e of layer l at token t = 0.57 static + 0.39 slow + 0.94 fast + 0.6 noise;  the top k are used

`static` is how liked an expert is, `slow` a topic (an Ornstein-Uhlenbeck walk in 16 dimensions, 16 tokens long), `fast` what a
word is about (2 tokens long), and both are seen by all layers through random matrices of their own, so that a path says
something about the next layer. The four weights and two lengths were found by random search for the four public numbers of
`PUBLIC` (colibri's measurements on OLMoE, 64 experts, top 8; bench/experts is tested against them).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["PUBLIC", "SEED", "Locality", "belady", "lru", "overlap", "routing", "statistics"]

Routing = NDArray[np.int16]
SEED = 20_260_929
PUBLIC = {"overlap": 0.403, "LRU at 8 of 64": 0.278, "LRU at 24 of 64": 0.684, "Belady at 24 of 64": 0.841}


@dataclass(frozen=True)
class Locality:
    """The generator's constants: dimensions of what drives it, lengths in tokens, weights of its four parts."""

    width: int = 16
    slow_tokens: float = 16.0
    fast_tokens: float = 2.0
    slow: float = 0.39
    fast: float = 0.94
    noise: float = 0.60
    static: float = 0.57


def routing(layers: int, experts: int, top_k: int, tokens: int, seed: int = SEED, how: Locality | None = None) -> Routing:
    """int16 (tokens, layers, top k): the experts of each token and layer, the one of highest score first."""
    how, draw = how or Locality(), np.random.default_rng(seed)
    of_slow, of_fast = (draw.standard_normal((layers, experts, how.width)) / np.sqrt(how.width) for _ in range(2))
    static = how.static * draw.standard_normal((layers, experts))
    slow, fast = draw.standard_normal(how.width), draw.standard_normal(how.width)
    keep_slow, keep_fast = np.exp(-1 / how.slow_tokens), np.exp(-1 / how.fast_tokens)
    out = np.empty((tokens, layers, top_k), np.int16)
    for t in range(tokens):
        slow = keep_slow * slow + np.sqrt(1 - keep_slow**2) * draw.standard_normal(how.width)
        fast = keep_fast * fast + np.sqrt(1 - keep_fast**2) * draw.standard_normal(how.width)
        noise = how.noise * draw.standard_normal((layers, experts))
        score = static + how.slow * (of_slow @ slow) + how.fast * (of_fast @ fast) + noise
        out[t] = np.argsort(-score, axis=1)[:, :top_k]
    return out


def overlap(trace: Routing) -> float:
    """Share of a token's experts that the token before used in the same layer."""
    same = (trace[1:, :, :, None] == trace[:-1, :, None, :]).any(3)
    return float(same.mean())


def lru(trace: Routing, slots: int) -> float:
    """Hit rate with `slots` in each layer, experts asked for one after another as they stand in the trace."""
    hits = 0
    for layer in range(trace.shape[1]):
        held: dict[int, None] = {}
        for expert in trace[:, layer].ravel().tolist():
            if expert in held:
                hits += 1
                del held[expert]
            elif len(held) >= slots:
                del held[next(iter(held))]
            held[expert] = None
    return hits / trace.size


def belady(trace: Routing, slots: int) -> float:
    """As `lru`, of the policy that evicts what is used furthest ahead. For all layers under one budget: edge.experts.replay."""
    hits = 0
    for layer in range(trace.shape[1]):
        asked = trace[:, layer].ravel().tolist()
        later, last = [0] * len(asked), dict[int, int]()
        for i in range(len(asked) - 1, -1, -1):
            later[i] = last.get(asked[i], len(asked) + asked[i])
            last[asked[i]] = i
        held: dict[int, int] = {}
        for i, expert in enumerate(asked):
            if expert in held:
                hits += 1
            elif len(held) >= slots:
                del held[max(held, key=held.__getitem__)]
            held[expert] = later[i]
    return hits / trace.size


def statistics(trace: Routing) -> dict[str, float]:
    """What `PUBLIC` says of OLMoE, of this trace."""
    found = (overlap(trace), lru(trace, 8), lru(trace, 24), belady(trace, 24))
    return {name: round(value, 3) for name, value in zip(PUBLIC, found, strict=True)}
