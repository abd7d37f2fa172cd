"""The device's story: frames in, predictions out, and a model that follows its surroundings.

    source ─► frame path ─► predictions                         frame loop: the caller's thread, waits for nobody
                 │    └──► requests over the network join here
                 ├─ kept frames ─► storage worker ─► outbox ═══► uplink ═══► cloud
                 └─ wanted taps ─► build worker ─► adapter ─► new engine ─► slot
                                       ▲
    cloud ═══► uplink ═══► updater ────┘                        verified, admitted, tried, then served

A dead cloud, a full disk or a bad release is said once, kept in the status and tried again; frames go on.
"""

from __future__ import annotations

import gc
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from io import BytesIO
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.adapt import Adapter, Reference
from edge.adaptation import Adaptation
from edge.cloud_link import CloudLink
from edge.directory import DataDirectory
from edge.engine import EngineFactory, EngineSlot
from edge.frame_path import Frame, FramePath, Prediction
from edge.inference import Handlers, InferenceServer
from edge.link_settings import SelectSettings
from edge.metrics import MetricsServer, prometheus_text, resident_bytes, write_status
from edge.outbox import Outbox
from edge.samples import SampleWriter
from edge.select import (
    BudgetSelector,
    NewDomain,
    NewDomainSelector,
    Selector,
    innermost,
    make_selector,
    rate_within,
    room,
)
from edge.serving import ServingState
from edge.settings import EdgeSettings
from edge.sinks import JsonLines
from edge.sources import Source, Stream, open_source
from edge.worker import Inline, Runner, Worker
from refold import __version__
from refold.atomic import write_atomically
from refold.bundle import Bundle
from refold.errors import RefoldError, StorageError, UsageError
from refold.v1 import fleet_pb2, samples_pb2

__all__ = ["Daemon"]

log = logging.getLogger(__name__)
U8 = NDArray[np.uint8]
SWITCH_SECONDS = 0.0005  # how long a worker may hold the interpreter against a frame; Python's own 5 ms is ten frames
TAPS_WAITING = 4  # tapped frames that may wait for the build worker
LINES_INLINE = 256  # predictions per write when there is no worker
OBSERVED_WAITING = 256  # answered requests that may wait to be looked at
BANK_SECONDS = 60.0  # between writes of the domain bank; what a kill loses is re-learnt in seconds


class Daemon:
    """One device. Use as a context manager, then `run`.

    Args:
        settings: everything.
        stop: set it (a signal handler does) to end `run` after the frame in hand.

    Raises:
        RefoldError: anything that stands in the way of serving the first frame: bundle, directory, source, ports.
    """

    def __init__(self, settings: EdgeSettings, stop: threading.Event | None = None) -> None:
        self.settings = settings
        self.stop = stop or threading.Event()
        self._started = time.time()
        self._observed: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.observed_dropped = 0
        if not settings.bundle:
            raise UsageError("No bundle to run: give --bundle FILE.refold or set `bundle` in the configuration.")
        self._closing = ExitStack()
        try:
            self._build()
        except BaseException:
            self._closing.close()
            raise

    def _build(self) -> None:
        s = self.settings
        self.bundle = Bundle.open(s.bundle)
        self.directory = DataDirectory(s.data)
        self.directory.lock()
        self._closing.callback(self.directory.unlock)
        self.factory = EngineFactory(self.bundle, s.engine.target or None, threads=s.engine.threads, cache=self.directory.cache)
        engine = self.factory.build(ServingState())
        self.factory.canary(engine)
        self.slot = EngineSlot(engine)
        self.storage, self.building = self._workers()
        self.outbox = Outbox(self.directory.outbox, s.outbox.limit_bytes)
        self._closing.callback(self.outbox.close)
        self.adaptation = Adaptation(self.factory, self.slot, self._adapter(), self.building, self._keep_report)
        self.link = CloudLink(s, self.bundle, self.directory, self.outbox, self.adaptation, self.heartbeat)
        self._closing.callback(self.link.close)
        self.link.restore()
        self.samples = SampleWriter(self.bundle, self.outbox, self.storage, s.engine.samples_waiting)
        self.sink = self._sink()
        self.path = self._frame_path()
        self.stream = Stream(
            partial(_open, s, self.bundle), fps=s.source.fps, loop=s.source.loop, max_frames=s.source.max_frames, stop=self.stop
        )
        self._closing.callback(self.stream.close)
        self.inference = self._inference()
        self.metrics_server = self._metrics_server()
        self._saved_bank = b""
        self._paced = (time.monotonic(), 0)
        self.final_status: dict[str, Any] = {}

    # ── parts ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _workers(self) -> tuple[Runner, Runner]:
        if self.settings.mode == "inline":
            return Inline(), Inline()
        niceness = self.settings.engine.worker_niceness
        storage = Worker("storage", self.settings.engine.samples_waiting, niceness=niceness)
        building = Worker("building", TAPS_WAITING, niceness=niceness)
        storage.every(self.settings.predictions.flush_ms / 1e3, self._flush)
        storage.every(self.settings.metrics.status_s, self.write_status)
        storage.every(BANK_SECONDS, self.save_bank)
        return storage, building

    def _adapter(self) -> Adapter:
        s, table, classes = self.settings.adapt_settings(), self.bundle.norms, self.bundle.manifest.class_count
        make = partial(Adapter, table, s, classes, reference=self._reference(), bundle_digest=self.bundle.digest)
        path = self.directory.bank(self.bundle.digest)
        try:
            content = path.read_bytes()
            return Adapter.load(content, table, s, classes, **make.keywords)
        except FileNotFoundError:
            pass
        except (OSError, StorageError) as e:
            log.warning("The domain bank %s is not used: %s", path, e)
        return make()

    def _reference(self) -> Reference | None:
        """How the calibration slice looks; without one the adapter takes its first frames for home."""
        part = self.bundle.manifest.calibration
        if not part:
            return None
        try:
            with np.load(BytesIO(self.bundle.read(part)), allow_pickle=False) as slice_:
                images = slice_["images"]
        except (KeyError, ValueError, OSError) as e:
            log.warning("The calibration slice of %s is not readable: %s", self.bundle.path, e)
            return None
        return Reference.measure(images) if len(images) >= 2 else None

    def _sink(self) -> JsonLines | None:
        s = self.settings.predictions
        return JsonLines(s.path, self.bundle.manifest.classes, limit_bytes=s.limit_mb * 10**6) if s.path else None

    def _frame_path(self) -> FramePath:
        keep, inline = self.settings.selection, self.settings.mode == "inline"
        classes = self.bundle.manifest.class_count
        return FramePath(
            self.bundle.preprocess,
            self.slot,
            selector=self._selector(keep, classes) if keep else None,
            adaptation=self.adaptation,
            on_prediction=self._add_inline if inline and self.sink else self.sink.add if self.sink else None,
            on_sample=self.samples.add if keep else None,
        )

    def _selector(self, keep: SelectSettings, classes: int) -> Selector:
        inner = make_selector(keep.name, classes, keep.options)
        quota = NewDomain(uploads=keep.new_domain, rate=keep.new_domain_rate)
        known = self.adaptation.adapter.known_domains  # after a restart: domains of the bank had their quota
        return NewDomainSelector(inner, quota, lambda: self.adaptation.domain, known)

    def _inference(self) -> InferenceServer | None:
        s = self.settings.inference
        if s.port is None:
            return None
        observe = self._observe if s.observe else None
        handlers = Handlers(self.bundle, self.slot, s.max_batch, observe, self.factory.runtime.platform)
        server = InferenceServer(handlers, s)
        self._closing.callback(server.close)
        return server

    def _metrics_server(self) -> MetricsServer | None:
        s = self.settings.metrics
        if s.port is None:
            return None
        labels = {"bundle": self.bundle.digest[:16], "model": self.bundle.manifest.name, "version": __version__}
        server = MetricsServer(s.host, s.port, lambda: prometheus_text(self.metrics(), labels))
        self._closing.callback(server.close)
        return server

    # ── the frame loop ──────────────────────────────────────────────────────────────────────────────────────────────────

    def __enter__(self) -> Daemon:
        gc.collect()
        gc.freeze()  # what lives until the end need not be looked through again: a full collection is 20 ms of no frames
        self._switch_interval = sys.getswitchinterval()
        sys.setswitchinterval(min(SWITCH_SECONDS, self._switch_interval))
        for worker in (self.storage, self.building):
            if isinstance(worker, Worker):
                worker.start()
        self.link.start()
        return self

    def run(self) -> int:
        """Serves frames until the source ends or `stop` is set; returns how many were served."""
        path, observed, stop = self.path, self._observed, self.stop
        for frame in self.stream:
            if frame is not None:
                path.step(frame)
            if not observed.empty():
                self._look_at_requests(frame is None)
            if stop.is_set():
                break
        self._look_at_requests(True)
        return path.frames

    def _look_at_requests(self, all_of_them: bool) -> None:
        """Requests that were answered on gRPC's threads: selector and adapter belong to this one."""
        with suppress(Empty):
            while True:
                self._observed.get_nowait()()
                if not all_of_them:
                    return

    def _observe(self, image: U8, logits: NDArray[np.float32], serving: ServingState, name: str, started: float) -> None:
        if self._observed.qsize() >= OBSERVED_WAITING:
            self.observed_dropped += 1
            return
        latency = time.perf_counter() - started
        unix_ms = time.time_ns() // 1_000_000

        def account() -> None:
            frame = Frame(self.path.frames, image, name, unix_ms)
            self.path.account(frame, logits, serving, time.perf_counter() - latency)

        self._observed.put(account)

    # ── what workers do ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _add_inline(self, prediction: Prediction) -> None:
        """Without a worker that flushes now and then, every so many lines."""
        assert self.sink is not None
        self.sink.add(prediction)
        if prediction.frame % LINES_INLINE == 0:
            self.storage.offer(self._flush)

    def _flush(self) -> None:
        if self.sink is not None:
            self.sink.flush()

    def _keep_report(self, report: samples_pb2.StatisticsReport) -> None:
        self.outbox.put_report(report)

    def save_bank(self) -> None:
        """Keeps the domains met. Raises StorageError: the old file stays."""
        content = self.adaptation.dump()
        if content != self._saved_bank:
            write_atomically(self.directory.bank(self.bundle.digest), [content])
            self._saved_bank = content

    def _follow_budget(self) -> None:
        """Keeps no more frames than the hour's bytes can carry: what the outbox would evict need not wear out a card."""
        now, frames = time.monotonic(), self.path.frames
        elapsed, served = now - self._paced[0], frames - self._paced[1]
        self._paced = (now, frames)
        waiting, held = len(self.outbox), self.outbox.bytes
        if isinstance(self.path.selector, NewDomainSelector):
            each = held / waiting if waiting else float(np.prod(self.bundle.preprocess.shape))
            self.path.selector.allow(room(self.link.available_bytes(), held, each))
        selector = innermost(self.path.selector)
        if isinstance(selector, BudgetSelector) and waiting and served > 0:
            rate = rate_within(self.settings.outbox.budget, held / waiting, served / max(elapsed, 1e-3))
            selector.set_rate(min(selector.settings.rate, rate))

    # ── what it says of itself ──────────────────────────────────────────────────────────────────────────────────────────

    def metrics(self) -> dict[str, float]:
        """A flat snapshot; any thread."""
        values = {
            **self.path.metrics(),
            **self.adaptation.metrics(),
            **self.link.metrics(),
            "frames_lost": float(self.stream.lost),
            "pictures_skipped": float(self.stream.skipped),
            "requests_observed_dropped": float(self.observed_dropped),
            "samples_stored": float(self.samples.stored),
            "samples_failed": float(self.samples.failed),
            "predictions_dropped": float(self.sink.dropped if self.sink else 0),
            "outbox_samples": float(len(self.outbox)),
            "outbox_bytes": float(self.outbox.bytes),
            "outbox_evicted": float(self.outbox.evicted),
            "resident_bytes": float(resident_bytes()),
            "uptime_s": time.time() - self._started,
        }
        return {k: v for k, v in values.items() if math.isfinite(v)}

    def error(self) -> str:
        """The latest thing that went wrong, in one sentence; empty when nothing did."""
        return self.link.last_error or self.storage.last_error or self.building.last_error

    def heartbeat(self) -> fleet_pb2.HeartbeatRequest:
        """What the uplink sends; it fills in bundle and version."""
        return fleet_pb2.HeartbeatRequest(
            state="serving", domain=self.adaptation.domain, metrics=self.metrics(), last_error=self.error()
        )

    def status(self) -> dict[str, Any]:
        """What `refold edge status` prints."""
        release = self.adaptation.release
        return {
            "version": __version__,
            "bundle": str(self.bundle.path),
            "bundle_digest": self.bundle.digest,
            "model": self.bundle.manifest.name,
            "target": self.factory.target,
            "integer_layers": self.factory.integer_layers,
            "release_version": release.version if release else 0,
            "domain": self.adaptation.domain,
            "cloud": self.link.state,
            "inference_port": self.inference.port if self.inference else None,
            "metrics_port": self.metrics_server.port if self.metrics_server else None,
            "last_skipped": self.stream.last_skipped,
            "last_error": self.error(),
            "unix_ms": time.time_ns() // 1_000_000,
            "running": True,
            "metrics": self.metrics(),
        }

    def write_status(self) -> None:
        self.link.look_around()
        self._follow_budget()
        write_status(self.directory.status, self.status())

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def __exit__(self, *exc: object) -> None:
        """Writes everything that waits, then lets go. An error of the disk is logged: it cannot be helped any more."""
        self.stop.set()
        with _said("inference"):
            if self.inference is not None:
                self.inference.close()
        self.link.stop()
        for worker in (self.building, self.storage):
            worker.close()
        with _said("samples"):
            self.samples.write()
        with _said("predictions"):
            if self.sink is not None:
                self.sink.close()
        with _said("domain bank"):
            self.save_bank()
        self.final_status = {**self.status(), "running": False}
        with _said("status"):
            write_status(self.directory.status, self.final_status)
        self._closing.close()
        sys.setswitchinterval(self._switch_interval)
        gc.unfreeze()


@contextmanager
def _said(what: str) -> Iterator[None]:
    try:
        yield
    except RefoldError as e:
        log.warning("At the end, %s: %s", what, e)


def _open(settings: EdgeSettings, bundle: Bundle) -> Source:
    return open_source(settings.source.path, bundle.preprocess, watch=settings.source.watch)
