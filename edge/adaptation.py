"""Carries out what the adapter decides: runs taps, builds engines, lets them prove themselves, swaps them in.

The frame loop only ever calls `watch`, which waits for nothing. Everything else runs on a worker (or inline), one change at a
time, whether it comes from the device's own statistics or from a release.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edge.adapt import Adapter, FrameFeatures, TapObserver
from edge.engine import EngineFactory, EngineSlot
from edge.serving import ServingState
from edge.worker import Runner
from refold.errors import RefoldError
from refold.release import Release
from refold.v1 import samples_pb2 as pb

__all__ = ["Adaptation"]

log = logging.getLogger(__name__)
U8 = NDArray[np.uint8]
FRAMES_WAITING = 64  # pictures the adapter may be behind, at a burst of taps; older ones are not looked at
LONGEST_WAIT = 0.02  # seconds a picture waits for company: waking a thread costs more than looking at a picture


class Adaptation:
    """The one owner of a device's adapter and of what its slot serves.

    Args:
        factory: builds the engines.
        slot: what the frame loop reads.
        adapter: asked at every frame.
        runner: where taps and builds happen.
        on_report: takes statistics reports as they come.
    """

    def __init__(
        self,
        factory: EngineFactory,
        slot: EngineSlot,
        adapter: Adapter,
        runner: Runner,
        on_report: Callable[[pb.StatisticsReport], None] | None = None,
    ) -> None:
        self.adapter = adapter
        self.domain = adapter.domain
        self.release: Release | None = None
        self.frames_unwatched = self.states_refused = 0
        self._factory = factory
        self._slot = slot
        self._runner = runner
        self._on_report = on_report
        self._changing = threading.Lock()  # the adapter is not thread-safe, and builds happen in the order decided
        self._waiting: deque[tuple[int, U8, float, int]] = deque(maxlen=FRAMES_WAITING)
        self._since = 0
        self._offered = 0.0
        self._observer = TapObserver(adapter, factory.build_taps, factory.bundle.preprocess)
        self._watching = factory.has_taps

    # The frame loop ----------------------------------------------------------------------------------------------------------

    def watch(self, frame: int, image: U8, entropy: float, predicted: int) -> None:
        """Leaves one frame for the adapter, which looks at it while the engine is busy with the next.

        Waits for nothing, but on a runner that does everything at once: then for this look and what comes of it.
        """
        if not self._watching:
            return
        if len(self._waiting) == FRAMES_WAITING:
            self.frames_unwatched += 1  # the oldest makes room
        self._waiting.append((frame, image, entropy, predicted))
        self._since += 1
        now = time.perf_counter()
        if self._since >= self._runner.batch or now - self._offered > LONGEST_WAIT:
            self._since, self._offered = 0, now
            self._runner.offer(self._look)

    def run_on(self, runner: Runner) -> None:
        """Looks at frames on another runner from now on; called before the first frame."""
        self._runner = runner

    # The worker --------------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        while self._waiting:
            frame, image, entropy, predicted = self._waiting.popleft()
            with self._changing:
                if self.adapter.wants_taps(FrameFeatures(image, entropy, predicted)):
                    self._observe(frame, image)
                self.domain = self.adapter.domain
                report = self.adapter.take_statistics()
            if report is not None and self._on_report is not None:
                self._on_report(report)

    def _observe(self, frame: int, image: U8) -> None:
        state = self._observer.observe(frame, image, self._slot.current.serving)
        if state is not None:
            try:
                self._serve(state)
            except RefoldError as e:
                self.states_refused += 1
                log.warning("A state made on this device is not served: %s", e)

    def _serve(self, state: ServingState) -> None:
        engine = self._factory.build(state)
        self._factory.canary(engine)
        self._slot.swap(engine)

    # Releases ----------------------------------------------------------------------------------------------------------------

    def canary(self, release: Release) -> None:
        """Tries a release without serving it. Raises GateError, NormStateError or BundleError when it makes no sense."""
        self._factory.canary(self._factory.build(ServingState.of(release)))

    def apply(self, release: Release | None) -> None:
        """Serves a release from the next frame on; None is the state the bundle was exported with.

        An older release than the present one is a rollback: the adapter forgets all newer ones.

        Raises:
            RefoldError: the engine could not be built; what served before still does.
        """
        with self._changing:
            before = self.release.version if self.release else 0
            if release is None or release.version < before:
                state: ServingState | None = self.adapter.on_rollback(release)
            else:
                state = self.adapter.on_release(release)
            self.domain = self.adapter.domain
            if state is not None:
                self._serve(state)
            self.release = release

    def dump(self) -> bytes:
        with self._changing:
            return self.adapter.dump()

    def metrics(self) -> dict[str, float]:
        with self._changing:
            values = self.adapter.metrics()
        served = self._slot.current.serving
        return {
            **{f"adapt_{name}": value for name, value in values.items()},
            "frames_unwatched": float(self.frames_unwatched),
            "states_refused": float(self.states_refused),
            "swaps": float(self._slot.swaps),
            "serving_version": float(served.release_version),
            "overlay": float(served.overlay),
        }
