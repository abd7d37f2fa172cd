"""The demo's story, start to end: pictures, export, cloud, device, watching, and the report's value."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demo.admin import AdminPoller
from demo.assets import Assets, cifar10_assets, digits_assets
from demo.plan import Phase, Stream, make_plan, make_stream
from demo.processes import Hold, Process, Processes
from demo.programs import Cloud, export_bundle, start_cloud, start_device
from demo.report import build
from demo.tally import Tally, recall
from demo.view import View
from demo.watch import Watch
from demo.workplace import workplace
from edge.engine import EngineFactory
from edge.serving import ServingState
from refold.bundle import Bundle
from refold.errors import InputError, StorageError
from refold.v1 import admin_pb2 as pb

__all__ = ["Options", "frozen_answers", "pace", "run"]

LAST_WORDS = 15.0  # seconds
FPS = 30.0  # of the stream, as a camera's, where an export takes `EXPORT_SECONDS`
SLOWEST_FPS = 20.0  # keeps the whole run below six minutes
EXPORT_SECONDS = 14.0


@dataclass(frozen=True)
class Options:
    frames: int
    seed: int
    work: Path
    digits: bool = False


class Outage:
    """The cloud stands still while the fog comes back: what the device does then, it does alone.

    From `BEFORE` frames before the phase until `LASTS` frames into it.
    """

    BEFORE = 80  # longer than the device's status.json stays as it is: what was installed before the outage is known before it
    LASTS = 220

    def __init__(self, processes: Processes, cloud: Process, phase: Phase) -> None:
        self.first, self.last = phase.first - self.BEFORE, min(phase.first + self.LASTS, phase.last)
        self._processes, self._cloud = processes, cloud
        self._hold: Hold | None = None

    def __call__(self, frame: int) -> str:
        """To be told every frame; returns a line for the view."""
        if self._hold is None and frame >= self.first:
            self._hold = self._processes.hold(self._cloud)
        if self._hold is not None and frame >= self.last:
            self._hold.release()
            return "the cloud is back"
        return "the cloud is held still: the device is on its own" if self._hold else ""

    def end(self) -> None:
        if self._hold is not None:
            self._hold.release()


class _Clock:
    """Seconds of each step, for the report."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - began


def run(options: Options, view: View) -> dict[str, Any]:
    """Runs the whole loop and returns the report's value. Nothing it started outlives it.

    Raises:
        RefoldError: a step could not be done; its sentence says which and why.
    """
    clock = _Clock()
    plan = make_plan(options.frames)
    with workplace(options.work) as work, Processes(work) as processes, clock.measure("all"):
        view.step("getting the pictures")
        with clock.measure("pictures"):
            assets, notes = _assets(options, work, view)
            stream = make_stream(plan, assets.images, assets.labels, options.seed, assets.climate)
            frames = _write_frames(work, stream)
        view.step(f"exporting the student to int8 ({assets.student.spec.rpartition(':')[2]})")
        with clock.measure("export"):
            path = export_bundle(processes, assets, work)
            bundle = Bundle.open(path)
        fps = pace(clock.seconds["export"])
        with clock.measure("frozen"):
            frozen = frozen_answers(bundle, stream.images)
        view.step("starting the cloud: its own certificate authority, a signing key, the bundle and its teacher")
        with clock.measure("cloud"):
            cloud = start_cloud(processes, assets, path, work)
        view.step("enrolling the device and starting it")
        with clock.measure("enrol"):
            predictions = work / "predictions.jsonl"
            device = start_device(processes, cloud, path, frames, predictions, fps, work)
        tally = Tally(plan, stream.labels, frozen)
        with clock.measure("stream"), AdminPoller(_asker(cloud)) as admin:
            outage = Outage(processes, cloud.process, plan.phases[-1])
            status = work / "device" / "status.json"
            watch = Watch(tally, predictions, admin, view, device, (cloud.process,), on_frame=outage, status=status)
            watch.run()
            outage.end()
            device.wait(LAST_WORDS)  # its source has ended: it sends what waits, and ends
            device.stop()
            watch.read()
            admin.refresh()
            watch.ask()
        cloud.process.stop()
        remembered = recall(tally, plan.phases[1], plan.phases[-1], [(a.installed, a.domain) for a in watch.arrivals])
        lives = [p.life(processes.origin) for p in (cloud.process, device)]
    return build(
        tally=tally,
        arrivals=watch.arrivals,
        remembered=remembered,
        traffic=watch.traffic,
        lives=lives,
        durations=clock.seconds,
        bundle={"digest": bundle.digest, "bytes": path.stat().st_size, "name": bundle.manifest.name},
        images=assets.name,
        seed=options.seed,
        notes=notes,
        outage=(outage.first, outage.last),
        fps=fps,
    )


def pace(export_seconds: float) -> float:
    """Frames per second: a machine that is slow to export, or busy, is slow to train, and gets its frames slower."""
    return min(FPS, max(SLOWEST_FPS, FPS * EXPORT_SECONDS / max(export_seconds, 0.1)))


def _assets(options: Options, work: Path, view: View) -> tuple[Assets, list[str]]:
    if options.digits:
        return digits_assets(work, view.say, options.seed), []
    try:
        return cifar10_assets(view.say, options.seed), []
    except InputError as e:
        if e.code != "no-images":
            raise
        note = f"{e.message} So this run is on scikit-learn's digits."
        view.say(note)
        return digits_assets(work, view.say, options.seed), [note]


def _write_frames(work: Path, stream: Stream) -> Path:
    path = work / "frames.npy"
    try:
        np.save(path, stream.images, allow_pickle=False)
    except OSError as e:
        raise StorageError(f"{path} cannot be written: {e.strerror or e}. Free some space.") from e
    return path


def frozen_answers(bundle: Bundle, images: NDArray[np.uint8], batch: int = 50) -> NDArray[np.int64]:
    """What the bundle's own integer engine says as exported: int64 (N,) classes."""
    engine = EngineFactory(bundle).build(ServingState())
    parts = [engine.run(bundle.preprocess.apply(images[i : i + batch])).argmax(1) for i in range(0, len(images), batch)]
    return np.concatenate(parts).astype(np.int64)


def _asker(cloud: Cloud) -> Any:
    """Asks the Admin service as the operator whose certificate `refold cloud init` made."""
    from cloud.client import Operator
    from cloud.settings import load_settings

    operator = Operator(load_settings(cloud.config, {}), cloud.folder / "operator.pem", cloud.folder / "operator.key")

    def ask() -> tuple[pb.StatusResponse, pb.ListReleasesResponse]:
        status: pb.StatusResponse = operator.call(operator.admin.Status, pb.StatusRequest())
        releases: pb.ListReleasesResponse = operator.call(operator.admin.ListReleases, pb.ListReleasesRequest())
        return status, releases

    return ask
