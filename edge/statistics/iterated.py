"""Statistics without a statistics graph: the tap engine looks at the same images again behind each new state until they stay.

A tap sees a norm's input behind the norms before it as they are at that moment, so one pass brings the first norm's statistics
right, the next pass the second's, and a few passes most of them. None of the states in between is served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge.serving import ServingState
from refold.errors import InputError
from refold.norms import NormState, unfold_moments
from refold.preprocess import Preprocess
from refold.statistics import Expectation, Layout, posterior, served_states

__all__ = ["IteratedTaps"]

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
PASSES = 24  # most passes of one measurement
STAYS = 0.01  # mean move of the observed means in one pass, in exported deviations, that ends it


class _Runs(Protocol):
    def run(self, x: F32) -> F32: ...


class IteratedTaps:
    """A `Measure` (edge.statistics.estimate).

    Args:
        taps, engine: make the tap engine and the engine of a state.
        preprocess: the bundle's.
        stopped: asked before each image; True ends the measurement with `InterruptedError`.
    """

    def __init__(
        self, layout: Layout, taps: Callable[[ServingState], _Runs], engine: Callable[[ServingState], _Runs],
        preprocess: Preprocess, stopped: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self._layout, self._taps, self._engine = layout, taps, engine
        self._preprocess, self._stopped = preprocess, stopped

    def __call__(
        self, images: Sequence[U8], base: ServingState, expected: Expectation, strength: F64, known: F64 | None,
        share: float,
    ) -> tuple[F64, F32]:  # fmt: skip
        """See `Measure`. Raises InputError for moments that are not finite."""
        deviation = np.where(expected.deviation > 0, expected.deviation, np.inf)
        states: dict[str, NormState] = dict(base.states)
        moments: F64 | None = None
        for _ in range(PASSES):
            seen = self._seen(images, replace(base, states=states))
            if known is not None:
                seen = share * known + (1 - share) * seen
            moved = np.inf if moments is None else float(np.mean(np.abs(seen[0] - moments[0]) / deviation))
            moments = seen
            if moved < STAYS:
                break
            variance = np.maximum(seen[1] - seen[0] ** 2, 0.0)
            found = posterior(
                self._layout, expected, seen[0], variance, self._layout.row("mean", base.states),
                self._layout.row("variance", base.states),
                strength,
            )  # fmt: skip
            states = served_states(self._layout, base.states, found)
        assert moments is not None
        return moments, self._each(self._engine(replace(base, states=states)), images)

    def _seen(self, images: Sequence[U8], served: ServingState) -> F64:
        """Mean moments of the norms' inputs, float64 (2, channels)."""
        found = self._each(self._taps(served), images).astype(np.float64).mean(0)
        if not np.isfinite(found).all():
            raise InputError("The tap model gave moments that are not finite: they are not used.", code="taps")
        out = np.empty((2, self._layout.channels))
        for site, cut in zip(self._layout.sites, self._layout.slices, strict=True):
            state = served.states.get(site.name, site.exported)
            mean, variance = unfold_moments(site, state, found[0, cut].astype(np.float32), found[1, cut].astype(np.float32))
            out[0, cut], out[1, cut] = mean, variance.astype(np.float64) + mean.astype(np.float64) ** 2
        return out

    def _each(self, engine: _Runs, images: Sequence[U8]) -> F32:
        answers = []
        for image in images:
            if self._stopped():
                raise InterruptedError
            answers.append(engine.run(self._preprocess.apply(image))[0])
        return np.stack(answers)
