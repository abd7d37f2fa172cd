"""The process that is measured: a real daemon beside a bare session of the same file. Run by `bench.overhead`; no torch in it.

    python -m bench.device time   BUNDLE FRAMES.npz '{"pairs": 9, "frames": 500, "swaps": 50}'
    python -m bench.device memory BUNDLE FRAMES.npz '{"what": "bare" | "daemon" | "measured", "frames": 500}'

Every line on standard output is a JSON object: `{"done": i, "of": n}` while it works, the figures at the end.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from bench.paired import paired
from edge.adapt.support import change_of_answers
from edge.daemon import Daemon
from edge.engine import choose_target
from edge.link_settings import SelectSettings
from edge.metrics import resident_bytes
from edge.serving import ServingState
from edge.settings import EdgeSettings, Predictions, Source
from edge.statistics import estimate, measure_of
from refold.bundle import Bundle
from refold.norms import NormState
from refold.release import Release

__all__ = ["bare_session", "main", "measure_time"]

F32 = NDArray[np.float32]
PREDICTIONS = "predictions.jsonl"
SEGMENTS = 5  # steady and swapping stretches in turn
MEASUREMENTS = 3  # of kept images, with steady stretches in turn


def bare_session(bundle: Bundle) -> ort.InferenceSession:
    """What a user of ONNX Runtime alone writes: the bundle's model, its exported tensors, one thread, nothing else."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    tensors = bundle.norms.tensors({})
    options.add_external_initializers(
        list(tensors), [ort.OrtValue.ortvalue_from_numpy(np.asarray(v)) for v in tensors.values()]
    )
    model = bundle.read(bundle.target(choose_target(bundle, runtime="ort")).model)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def whole_daemon(bundle: Path, frames: Path, folder: Path) -> Daemon:
    """Everything on: adaptation and taps, selector, outbox on disk, predictions to a file, status file."""
    return Daemon(
        EdgeSettings(
            bundle=str(bundle),
            data=str(folder / "data"),
            source=Source(path=str(frames), loop=True, waits="no"),
            predictions=Predictions(path=str(folder / PREDICTIONS), limit_mb=0),
            select=SelectSettings(),
        )
    )


class Loop:
    """The daemon's own frame loop, in pieces."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._stream = iter(daemon.stream)
        self.offered = 0

    def serve(self, count: int) -> list[float]:
        """Seconds from frame to frame: reading ahead, preprocessing, engine, verdict and hand-over."""
        step, out = self._daemon.path.step, []
        last = time.perf_counter()
        for frame in self._stream:
            if frame is not None:
                step(frame)
                now = time.perf_counter()
                out.append(now - last)
                last = now
            if len(out) == count:
                break
        self.offered += len(out)
        return out

    def latencies(self, until: threading.Event) -> list[float]:
        """Seconds from frame to frame until the event is set."""
        out: list[float] = []
        while not until.is_set():
            out += self.serve(1)
        return out

    def drain(self) -> None:
        """Waits until the workers have nothing left to do: a bare block must not pay for the daemon's."""
        for worker in (self._daemon.building, self._daemon.storage):
            done = threading.Event()
            while not worker.offer(done.set):
                time.sleep(0.002)
            done.wait(30)


def perturbed(bundle: Bundle, version: int) -> Release:
    """A release within a few per cent of the exported state; every one different."""
    rng = np.random.default_rng(version)
    states = {}
    for site in bundle.norms.norms:
        e = site.exported
        factor = rng.uniform(0.97, 1.03, e.gamma.shape).astype(np.float32)
        states[site.name] = NormState(e.gamma * factor, e.beta + np.float32(0.01) * (factor - 1), e.mean, e.variance)
    return Release(bundle.digest, "bench", version, states, parent_version=version - 1)


def measure_time(bundle_path: Path, frames: Path, folder: Path, pairs: int, count: int, swaps: int) -> dict[str, Any]:
    """Ratio of the daemon's loop to bare runs, then swaps under load."""
    bundle = Bundle.open(bundle_path)
    bare = bare_session(bundle)
    with np.load(frames) as z:
        x: F32 = bundle.preprocess.apply(z["images"][:1])
    name, outputs = bare.get_inputs()[0].name, [bare.get_outputs()[0].name]

    def run_bare() -> list[float]:
        out = []
        last = time.perf_counter()
        for _ in range(count):
            bare.run(outputs, {name: x})
            now = time.perf_counter()
            out.append(now - last)
            last = now
        return out

    with whole_daemon(bundle_path, frames, folder) as daemon:
        loop = Loop(daemon)
        loop.serve(2 * count)  # the adapter has seen something; the outbox has its first commits behind it
        medians: tuple[list[float], list[float]] = ([], [])
        cpu = [0.0, 0.0]

        def counted(which: int, serve: Callable[[], list[float]]) -> None:
            started = time.process_time()
            medians[which].append(median(serve()))
            cpu[which] += time.process_time() - started

        times = paired(
            lambda: counted(0, lambda: loop.serve(count)),
            lambda: counted(1, run_bare),
            pairs,
            before_each=loop.drain,
            after_pair=lambda i: tell(i, pairs + SEGMENTS),
        )
        ratios = [a / b for a, b in zip(medians[0][1:], medians[1][1:], strict=True)]  # the first pair is not counted
        figures: dict[str, Any] = {
            "ratio": median(ratios),
            "ratios": [round(r, 4) for r in ratios],
            "block_ratio": times.ratio,
            "daemon_ms": 1e3 * median(medians[0][1:]),
            "bare_ms": 1e3 * median(medians[1][1:]),
            "cpu_ratio": cpu[0] / cpu[1],
            "integer_layers": daemon.factory.integer_layers,
            "expected_integer_layers": daemon.factory.expected_integer_layers,
        }
        figures |= _swaps(daemon, loop, swaps, pairs) if swaps else {}
        figures |= _measuring(daemon, loop, frames) if swaps else {}
        figures["metrics"] = {k: v for k, v in daemon.metrics().items() if k.startswith(("adapt_", "taps", "samples", "swaps"))}
        lost = daemon.metrics()["frames_lost"]
    lines = predictions_written(folder / PREDICTIONS)
    figures |= {"frames": loop.offered, "predictions": lines, "frames_lost": loop.offered - lines + int(lost)}
    return figures


def predictions_written(path: Path) -> int:
    with path.open("rb") as f:
        return sum(1 for _ in f)


def _beside(loop: Loop, work: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Latencies from frame to frame while another thread does some work, and then without it for as many seconds, at least
    one, as the work returns.
    """
    done, rest = threading.Event(), threading.Event()
    took: list[float] = []

    def run() -> None:
        try:
            took.append(work())
        finally:
            done.set()

    thread = threading.Thread(target=run)
    thread.start()
    busy = loop.latencies(done)
    thread.join()
    loop.drain()
    threading.Timer(max([1.0, *took]), rest.set).start()
    return busy, loop.latencies(rest)


def _swaps(daemon: Daemon, loop: Loop, swaps: int, told: int) -> dict[str, Any]:
    """Latency from frame to frame with and without releases being applied by another thread, in turn."""
    steady: list[float] = []
    swapping: list[float] = []
    apply_seconds: list[float] = []
    version = 0
    for segment in range(SEGMENTS):
        releases = [perturbed(daemon.bundle, version + i + 1) for i in range(swaps // SEGMENTS)]
        version += len(releases)

        def apply(releases: list[Release] = releases) -> float:
            for release in releases:
                started = time.perf_counter()
                daemon.adaptation.apply(release)
                apply_seconds.append(time.perf_counter() - started)
                time.sleep(0.05)
            return 1.2 * sum(apply_seconds[-len(releases) :])

        busy, quiet = _beside(loop, apply)
        swapping += busy
        steady += quiet
        tell(told + segment + 1, told + SEGMENTS)
    p99, steady99 = (float(np.percentile(v, 99)) for v in (swapping, steady))
    return {
        "swaps": version,
        "apply_ms": 1e3 * median(apply_seconds),
        "p50_steady_ms": 1e3 * median(steady),
        "p99_steady_ms": 1e3 * steady99,
        "p50_swapping_ms": 1e3 * median(swapping),
        "p99_swapping_ms": 1e3 * p99,
        "p99_ratio": p99 / steady99,
        "max_swapping_ms": 1e3 * max(swapping),
        "frames_while_swapping": len(swapping),
    }


def _measuring(daemon: Daemon, loop: Loop, frames: Path) -> dict[str, Any]:
    """Latency from frame to frame with and without another thread measuring kept images as the daemon does, in turn."""
    images = list(np.load(frames)["images"])
    adapter = daemon.adaptation.adapter
    memory = max(adapter.settings.memory_mb // 2, 1)
    images = (images * adapter.settings.images)[: min(adapter.settings.images, memory * 2**20 // images[0].nbytes)]
    measure = measure_of(daemon.factory, adapter.model, memory)
    if measure is None:
        return {}
    steady: list[float] = []
    measuring: list[float] = []
    seconds: list[float] = []

    def work() -> float:
        started = time.perf_counter()
        found = estimate(measure, adapter.model, ServingState(), images)
        states, _ = adapter.model.served({}, found.moments, found.frames, found.mix)
        change_of_answers(measure, adapter.model, ServingState(), ServingState(states), images)
        seconds.append(time.perf_counter() - started)
        return seconds[-1]

    for _ in range(MEASUREMENTS):
        busy, quiet = _beside(loop, work)
        measuring += busy
        steady += quiet
    p99, steady99 = (float(np.percentile(v, 99)) for v in (measuring, steady))
    return {
        "images_measured": len(images),
        "measurement_s": median(seconds),
        "p99_measuring_ms": 1e3 * p99,
        "p99_beside_measuring_ms": 1e3 * steady99,
        "p99_measuring_ratio": p99 / steady99,
        "frames_while_measuring": len(measuring),
    }


def measure_memory(bundle_path: Path, frames: Path, folder: Path, what: str, count: int) -> dict[str, Any]:
    """Resident memory after some frames, of a bare session, of the whole daemon, or of one that has measured kept images: its
    statistics graph stays open. All have imported the same.
    """
    if what != "bare":
        with whole_daemon(bundle_path, frames, folder) as daemon:
            loop = Loop(daemon)
            loop.serve(count)
            if what == "measured":
                _measuring(daemon, loop, frames)
            loop.drain()
            return {"resident_mb": resident_bytes() / 2**20}
    bundle = Bundle.open(bundle_path)
    bare = bare_session(bundle)
    with np.load(frames) as z:
        x = bundle.preprocess.apply(z["images"][:1])
    for _ in range(count):
        bare.run(None, {bare.get_inputs()[0].name: x})
    return {"resident_mb": resident_bytes() / 2**20}


def tell(done: int, of: int) -> None:
    sys.stdout.write(json.dumps({"done": done, "of": of}) + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> None:
    mode, bundle, frames, options = arguments[0], Path(arguments[1]), Path(arguments[2]), json.loads(arguments[3])
    with tempfile.TemporaryDirectory(prefix="refold-device-") as folder:
        if mode == "time":
            figures = measure_time(bundle, frames, Path(folder), options["pairs"], options["frames"], options["swaps"])
        else:
            figures = measure_memory(bundle, frames, Path(folder), options["what"], options["frames"])
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
