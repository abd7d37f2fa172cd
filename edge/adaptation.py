"""Carries out what the adapter decides: runs taps, builds engines, lets them prove themselves, swaps them in.

The frame loop only ever calls `watch`, which waits for nothing. Everything else runs on a worker (or inline), one change at a
time, whether it comes from the device's own statistics or from a release.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edge.adapt import Adapter, FrameFeatures
from edge.engine import EngineFactory, EngineSlot, TapEngine
from edge.serving import ServingState
from edge.worker import Runner
from refold.errors import RefoldError
from refold.release import Release
from refold.v1 import samples_pb2 as pb

__all__ = ["Adaptation"]

log = logging.getLogger(__name__)
U8 = NDArray[np.uint8]


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
        self.taps_skipped = self.states_refused = 0
        self._factory = factory
        self._slot = slot
        self._runner = runner
        self._on_report = on_report
        self._deciding = threading.Lock()  # the adapter is not thread-safe; held for microseconds
        self._changing = threading.Lock()  # one build at a time, in the order decided
        self._taps: TapEngine | None = None
        self._watching = factory.has_taps

    # The frame loop ----------------------------------------------------------------------------------------------------------

    def watch(self, frame: int, image: U8, entropy: float, predicted: int) -> None:
        """Shows the adapter one frame, unless it is just deciding; asks the runner for taps when they are wanted."""
        if not self._watching:
            return
        if not self._deciding.acquire(blocking=False):
            self.taps_skipped += 1
            return
        try:
            wanted = self.adapter.wants_taps(FrameFeatures(image, entropy, predicted))
            self.domain = self.adapter.domain
        finally:
            self._deciding.release()
        if wanted and not self._runner.offer(partial(self._observe, frame, image)):
            self.taps_skipped += 1

    # The worker --------------------------------------------------------------------------------------------------------------

    def _observe(self, frame: int, image: U8) -> None:
        with self._changing:
            serving = self._slot.current.serving
            if self._taps is None or self._taps.serving is not serving:
                self._taps = self._factory.build_taps(serving)
            moments = self._taps.run(self._factory.bundle.preprocess.apply(image))[0]
            with self._deciding:
                state = self.adapter.observe_taps(frame, moments, serving)
                report = self.adapter.take_statistics()
                self.domain = self.adapter.domain
            if state is not None:
                try:
                    self._serve(state)
                except RefoldError as e:
                    self.states_refused += 1
                    log.warning("A state made on this device is not served: %s", e)
        if report is not None and self._on_report is not None:
            self._on_report(report)

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
            with self._deciding:
                if release is None or release.version < before:
                    state: ServingState | None = self.adapter.on_rollback(release)
                else:
                    state = self.adapter.on_release(release)
                self.domain = self.adapter.domain
            if state is not None:
                self._serve(state)
            self.release = release

    def dump(self) -> bytes:
        with self._deciding:
            return self.adapter.dump()

    def metrics(self) -> dict[str, float]:
        with self._deciding:
            values = self.adapter.metrics()
        served = self._slot.current.serving
        return {
            **{f"adapt_{name}": value for name, value in values.items()},
            "taps_skipped": float(self.taps_skipped),
            "states_refused": float(self.states_refused),
            "swaps": float(self._slot.swaps),
            "serving_version": float(served.release_version),
            "overlay": float(served.overlay),
        }
