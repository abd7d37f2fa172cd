"""Carries out what the adapter decides: measures kept images, builds engines, tries them, swaps them in.

The frame loop only ever calls `watch`, which waits for nothing. Everything else runs on a worker (or inline), one change at a
time, whether it comes from the device's own statistics or from the releases in force. Those are the updater's to name: it
stages a set of them here, and serves or drops it (edge/updates/engines.py). The steps are rows of edge/updates/table.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edge.adapt import Adapter, FrameFeatures, ImageObserver, Proposal
from edge.adapt.observer import StoppedError
from edge.engine import Engine, EngineFactory, EngineSlot
from edge.serving import ServingState
from edge.statistics import measure_of
from edge.updates.inforce import Entry, InForce
from edge.worker import Runner
from refold.errors import RefoldError, ReleaseError
from refold.release import Release, digest, encode
from refold.v1 import samples_pb2 as pb

__all__ = ["Adaptation"]

log = logging.getLogger(__name__)
U8 = NDArray[np.uint8]
FRAMES_WAITING = 64  # pictures the adapter may be behind, while kept ones are measured; older ones are not looked at
LONGEST_WAIT = 0.02  # seconds a picture waits for company: waking a thread costs more than looking at a picture


class StagedReleases:
    """A set of releases whose engine was tried (None: the present one serves it). Holds the adapter until served or dropped."""

    def __init__(self, owner: Adaptation, proposal: Proposal, engine: Engine | None) -> None:
        self._owner, self._proposal, self._engine = owner, proposal, engine
        self._open = True

    def serve(self) -> None:
        """From the next frame on."""
        owner = self._owner
        try:
            owner.adapter.commit(self._proposal, offered=self._engine is not None)
            owner.releases = self._proposal.releases
            if self._engine is not None:
                owner._slot.swap(self._engine)
            owner.domain = owner.adapter.domain
        finally:
            self.drop()

    def drop(self) -> None:
        """Lets the adapter go on."""
        if self._open:
            self._open = False
            self._owner._changing.release()


class Adaptation:
    """The one owner of a device's adapter and of what its slot serves.

    Args:
        factory: builds the engines.
        slot: what the frame loop reads.
        adapter: asked at every frame.
        runner: where measurements and builds happen.
        on_report: takes statistics reports as they come.
        at: called with the name of each step of a change of the device's own when it is done; for tests.
    """

    def __init__(
        self,
        factory: EngineFactory,
        slot: EngineSlot,
        adapter: Adapter,
        runner: Runner,
        on_report: Callable[[pb.StatisticsReport], None] | None = None,
        at: Callable[[str], None] = lambda step: None,
    ) -> None:
        self.adapter = adapter
        self.domain = adapter.domain
        self.releases = adapter.releases
        self.frames_unwatched = self.states_refused = self.taken_back = 0
        self._factory = factory
        self._slot = slot
        self._runner = runner
        self._on_report = on_report
        self._at = at
        self._changing = threading.Lock()  # the adapter is not thread-safe, and builds happen in the order decided
        self._waiting: deque[tuple[int, U8, float, int]] = deque(maxlen=FRAMES_WAITING)
        self._since = 0
        self._offered = 0.0
        memory = max(adapter.settings.memory_mb // 2, 1)  # the other half is for kept images
        measure = measure_of(factory, adapter.model, memory, lambda: self._observer is not None and self._observer.stopped)
        self._observer = ImageObserver(adapter, measure, adapter.model) if measure is not None else None
        self._watching = self._observer is not None

    # The frame loop ----------------------------------------------------------------------------------------------------------

    @property
    def watches(self) -> bool:
        """Whether anything looks at frames: where nothing is measured, no shift is noticed either."""
        return self._watching

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

    def stop(self) -> None:
        """Ends a measurement that is being made, and begins no further one; any thread, at the end.

        A thread that is still inside the engine's C++ when the interpreter ends takes the process down with it.
        """
        self._watching = False
        self._waiting.clear()
        if self._observer is not None:
            self._observer.stopped = True

    # The worker --------------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        while self._waiting:
            frame, image, entropy, predicted = self._waiting.popleft()
            with self._changing:
                if self.adapter.wants_image(FrameFeatures(image, entropy, predicted)):
                    try:
                        self._observe(frame, image)
                    except StoppedError:
                        return
                self.domain = self.adapter.domain
                report = self.adapter.take_statistics()
            if report is not None and self._on_report is not None:
                self._on_report(report)

    def _observe(self, frame: int, image: U8) -> None:
        served = self._slot.current.serving
        assert self._observer is not None
        state = self._observer.observe(frame, image, served)
        if state is not None:
            self._at("proposed")
            try:
                self._serve(state)
            except Exception as e:
                self.states_refused += 1
                self.adapter.dropped(state, served)
                if not isinstance(e, RefoldError):
                    raise
                log.warning("A state made on this device is not served: %s", e)
            else:
                self._tell(served, state)

    def _tell(self, before: ServingState, now: ServingState) -> None:
        if before.overlay and not now.overlay:
            if before.domain == now.domain:
                self.taken_back += 1
                log.info(
                    "Domain %s: this device's own statistics are taken back, later images do not speak for them: agreement of "
                    "mirrored views changes by %+.3f.",
                    now.domain,
                    self.adapter.metrics()["agreement_gain"],
                )
            else:
                log.info("Domain %s again: served without this device's own statistics of %s.", now.domain, before.domain)

    def _serve(self, state: ServingState) -> None:
        if not self.releases.allows(state.release_digest):
            raise ReleaseError(f"Release {state.release_version} is not in force: a state made of it is not served.")
        engine = self._tried(state)
        self._slot.swap(engine)
        self._at("served")

    def _tried(self, state: ServingState) -> Engine:
        engine = self._factory.build(state)
        self._at("built")
        self._factory.canary(engine)
        self._at("tried")
        return engine

    # Releases: the updater's seam (edge.updates.engines.Engines) -------------------------------------------------------------

    @property
    def release(self) -> Release | None:
        """The current one; None as exported."""
        return self.releases.release

    def canary(self, release: Release) -> None:
        """Tries a release without serving it. Raises GateError, NormStateError or BundleError when it makes no sense."""
        self._factory.canary(self._factory.build(ServingState.of(release)))

    def bind(self, domain: str) -> str:
        with self._changing:
            return self.adapter.key_of(domain)

    def base(self, wanted: InForce) -> str:
        with self._changing:
            return self.adapter.propose(wanted).serving.release_digest

    def stage(self, wanted: InForce) -> StagedReleases:
        """Builds and tries what these releases would serve in the present domain. Until it is served or dropped, the adapter
        stands still; frames go on.

        Raises:
            RefoldError: the engine could not be built or makes no sense; what served before still does.
        """
        self._changing.acquire()
        try:
            proposal = self.adapter.propose(wanted)
            served = self._slot.current.serving
            stale = served.release_digest != proposal.serving.release_digest
            engine = self._tried(proposal.serving) if proposal.moved or stale else None
        except BaseException:
            self._changing.release()
            raise
        return StagedReleases(self, proposal, engine)

    def apply(self, release: Release | None) -> None:
        """Serves an admitted release at once, without an updater; None is the exported state. An older one is a rollback.

        Raises:
            RefoldError: as `stage`.
        """
        wanted = InForce()
        if release is not None:
            entry = Entry(release.version, release.domain, digest(encode(release)), self.bind(release.domain))
            wanted = self.releases.ordered(entry, release)
        self.stage(wanted).serve()

    def dump(self) -> bytes:
        with self._changing:
            return self.adapter.dump()

    def metrics(self) -> dict[str, float]:
        values = self.adapter.metrics()  # without the lock: a snapshot of numbers must not wait for a build or a disk
        served = self._slot.current.serving
        return {
            **{f"adapt_{name}": value for name, value in values.items()},
            "frames_unwatched": float(self.frames_unwatched),
            "states_refused": float(self.states_refused),
            "states_taken_back": float(self.taken_back),
            "swaps": float(self._slot.swaps),
            "serving_version": float(served.release_version),
            "overlay": float(served.overlay),
        }
