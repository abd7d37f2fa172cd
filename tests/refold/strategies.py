"""Random sites and states as they occur: any width, some channels dead, some with a negative gamma."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from refold import NormKind, NormSite, NormState

XS = 0.031


def state(rng: np.random.Generator, n: int, *, dead: bool = False) -> NormState:
    gamma = rng.uniform(0.05, 3.0, n) * rng.choice([-1, 1], n)
    if dead and n > 1:
        gamma[rng.integers(n)] = 1e-9
    return NormState(gamma, rng.normal(0, 1, n), rng.normal(0, 2, n), rng.uniform(1e-3, 4.0, n))


def codes(rng: np.random.Generator, n: int, fan_in: int = 27) -> NDArray[np.int8]:
    return rng.integers(-63, 64, (n, fan_in)).astype(np.int8)


def site(rng: np.random.Generator, n: int, *, dead: bool = False) -> NormSite:
    return NormSite.folded(
        "layer1.0.conv1",
        weight_scale=rng.uniform(1e-4, 2e-2, n).astype(np.float32),
        layer_bias=rng.normal(0, 0.1, n).astype(np.float32),
        exported=state(rng, n, dead=dead),
        input_tensor="input",
        input_scale=XS,
    )


def nudge(rng: np.random.Generator, s: NormState, by: float = 0.5) -> NormState:
    """An admissible neighbour: same signs, everything moved by a factor of up to (1 + by)."""
    n = s.gamma.shape[0]

    def factor() -> NDArray[np.float64]:
        return np.exp(rng.uniform(-by, by, n))

    return NormState(s.gamma * factor(), s.beta + rng.normal(0, by, n), s.mean + rng.normal(0, by, n), s.variance * factor())


rngs = st.integers(0, 2**32 - 1).map(np.random.default_rng)
widths = st.integers(1, 40)
EXPLICIT = (NormKind.BATCH, NormKind.LAYER, NormKind.GROUP, NormKind.RMS)
