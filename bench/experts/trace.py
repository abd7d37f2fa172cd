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

__all__ = ["PUBLIC", "SEED", "Locality", "Text", "belady", "lru", "overlap", "routing", "statistics"]

Routing = NDArray[np.int16]
F64 = NDArray[np.float64]
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


class Text:
    """What a trace is drawn from: `token` goes on by one, `outlook` says what may be known of later ones."""

    def __init__(self, layers: int, experts: int, seed: int = SEED, how: Locality | None = None) -> None:
        self.how = how = how or Locality()
        self._draw = draw = np.random.default_rng(seed)
        self._of_slow, self._of_fast = (
            draw.standard_normal((layers, experts, how.width)) / np.sqrt(how.width) for _ in range(2)
        )
        self._static = how.static * draw.standard_normal((layers, experts))
        self._slow, self._fast = draw.standard_normal(how.width), draw.standard_normal(how.width)
        self._keep_slow, self._keep_fast = np.exp(-1 / how.slow_tokens), np.exp(-1 / how.fast_tokens)

    def token(self) -> F64:
        """float64 (layers, experts): scores of the next token."""
        draw, width, s, f = self._draw, self.how.width, self._keep_slow, self._keep_fast
        self._slow = s * self._slow + np.sqrt(1 - s**2) * draw.standard_normal(width)
        self._fast = f * self._fast + np.sqrt(1 - f**2) * draw.standard_normal(width)
        return self._mean(1.0, 1.0) + self.how.noise * draw.standard_normal(self._static.shape)

    def outlook(self, ahead: int) -> tuple[F64, float]:
        """Means (layers, experts) and spread of the scores `ahead` tokens from now (0 or more), to one who knows all that is
        drawn, but for the noise of this token."""
        s, f, how = self._keep_slow**ahead, self._keep_fast**ahead, self.how
        spread = np.sqrt(how.noise**2 + (1 - s**2) * how.slow**2 + (1 - f**2) * how.fast**2)
        return self._mean(s, f), float(spread)

    def _mean(self, slow: float, fast: float) -> F64:
        how = self.how
        return np.asarray(
            self._static + how.slow * (self._of_slow @ (slow * self._slow)) + how.fast * (self._of_fast @ (fast * self._fast))
        )


def routing(layers: int, experts: int, top_k: int, tokens: int, seed: int = SEED, how: Locality | None = None) -> Routing:
    """int16 (tokens, layers, top k): the experts of each token and layer, the one of highest score first."""
    text = Text(layers, experts, seed, how)
    out = np.empty((tokens, layers, top_k), np.int16)
    for t in range(tokens):
        out[t] = np.argsort(-text.token(), axis=1)[:, :top_k]
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
