"""Taps for the adapter: runs the tap model on a frame and, early in a new domain, on the frames before it once more.

A tap sees a norm's input behind the norms *before* it as they are served, so statistics gathered while states change are those
of several networks. Letting the same few frames pass again behind each new state converges to the statistics a whole batch
would have measured layer by layer, after about as many passes as it takes the change to die out; 32 frames seen six times
serve better than 200 seen once (docs/adr/006-adaptation.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge.adapt.adapter import Adapter
from edge.serving import ServingState
from refold.preprocess import Preprocess

__all__ = ["StoppedError", "TapObserver", "Taps"]

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


class StoppedError(Exception):
    """The observer was stopped in the middle of a look."""


class Taps(Protocol):
    """A tap engine: float32 (N, 3, H, W) to moments float32 (N, 2, channels), at one state."""

    @property
    def serving(self) -> ServingState: ...

    def run(self, x: F32) -> F32: ...


class TapObserver:
    """The way from a picture to the adapter's evidence. Not thread-safe, as the adapter is not.

    Args:
        adapter: asked and told.
        build: makes the tap engine of a state.
        preprocess: the bundle's.
    """

    def __init__(self, adapter: Adapter, build: Callable[[ServingState], Taps], preprocess: Preprocess) -> None:
        self._adapter, self._build, self._preprocess = adapter, build, preprocess
        self._taps: Taps | None = None
        self._kept: deque[U8] = deque(maxlen=adapter.settings.burst)
        self._domain = adapter.domain
        self.passes = 0
        self.stopped = False  # set by another thread: a look ends before its next tap

    def observe(self, frame: int, image: U8, served: ServingState) -> ServingState | None:
        """Taps one frame, uint8 (H, W, 3); a state to serve from now on, or None to go on with `served`.

        Raises:
            StoppedError: `stopped` was set.
            InputError: the tap model's moments do not fit the bundle or are not finite.
            BundleError: a tap engine cannot be built.
        """
        if self._adapter.domain != self._domain:
            self._domain = self._adapter.domain
            self._kept.clear()
        if self._adapter.settling:
            self._kept.append(image)
        state = self._adapter.observe_taps(frame, self._moments([image], served), served)
        while state is not None and self._adapter.wants_settled(len(self._kept)):
            self.passes += 1
            state = self._adapter.settle(self._moments(self._kept, state), len(self._kept), state)
        if not self._adapter.settling:
            self._kept.clear()
        return state

    def _moments(self, images: Iterable[U8], served: ServingState) -> F32:
        """Mean over some frames, float32 (2, channels)."""
        if self._taps is None or self._taps.serving is not served:
            self._taps = self._build(served)
        taps = self._taps
        found = []
        for image in images:
            if self.stopped:
                raise StoppedError
            found.append(taps.run(self._preprocess.apply(image))[0])
        mean: F32 = np.stack(found).mean(0, dtype=np.float64).astype(np.float32)
        return mean
