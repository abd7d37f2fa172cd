"""The device's story: frames in, predictions out, and a model that follows its surroundings.

    source ─► frame path ─► predictions                         frame loop: the caller's thread, waits for nobody
                 │    └──► requests over the network join here
                 ├─ kept frames ─► storage worker ─► outbox ═══► uplink ═══► cloud
                 └─ wanted taps ─► build worker ─► adapter ─► new engine ─► slot
                                       ▲
    cloud ═══► uplink ═══► updater ────┘                        verified, admitted, tried, then served

A dead cloud, a full disk or a bad release is said once, kept in the status and tried again; frames go on. So it is at the
start: only what no disk decides (bundle, source, ports, a path that is none) can keep a daemon from its first frame.
"""

from __future__ import annotations

import gc
import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from io import BytesIO
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.adapt import HOME, Adapter, Reference
from edge.adaptation import Adaptation
from edge.adaptation.corrections import Corrector, RequestCorrector, SecondLook, make_corrector
from edge.adaptation.novelty import NoveltyGate
from edge.cloud_link import CloudLink
from edge.directory import DataDirectory
from edge.engine import EngineFactory, EngineSlot
from edge.frame_path import Frame, FramePath, Prediction
from edge.inference import Handlers, InferenceServer
from edge.link_settings import SelectSettings
from edge.metrics import MetricsServer, prometheus_text, resident_bytes
from edge.outbox import Outbox
from edge.runtime import Board, Latest, bounded
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
from edge.worker import Inline, Runner, Waiting, Worker
from refold import __version__
from refold.atomic import write_atomically
from refold.bundle import Bundle
from refold.errors import InputError, RefoldError, StorageError, UsageError
from refold.imaging import open_regular
from refold.statistics import StatisticsModel
from refold.v1 import fleet_pb2, samples_pb2

__all__ = ["Daemon"]

log = logging.getLogger(__name__)
U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
SWITCH_SECONDS = 0.0005  # how long a worker may hold the interpreter against a frame; Python's own 5 ms is ten frames
TAPS_WAITING = 4  # tapped frames that may wait for the build worker
LINES_INLINE = 256  # predictions per write when there is no worker
REPORTS_WAITING = 32  # statistics that may wait for the disk; the outbox keeps no more either
OBSERVED_WAITING = 256  # answered requests that may wait to be looked at
RETRY_SECONDS = 1.0  # between looks at whether the disk takes the data directory again
STUCK_SECONDS = 3.0  # a task at a disk that takes longer is said while it waits
ANSWER_SECONDS = 2.0  # that a start waits for a disk, and for whoever only looks whether a daemon runs
ENDING_SECONDS = 10.0  # half of what systemd allows before it kills (deploy/refold-edge.service)
KNOWN_IMAGES = 256  # calibration images that novelty gate and AdaNPC begin with: seconds of a slow net, at the start
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
        self._refused: UsageError | None = None
        self._closing.callback(self.directory.unlock)
        self._disk_answers = self._begin_directory()
        cache = self.directory.cache if self._disk_answers else None
        self.factory = EngineFactory(self.bundle, s.engine.target or None, threads=s.engine.threads, cache=cache)
        engine = self.factory.build(ServingState())
        self.factory.canary(engine)
        self.slot = EngineSlot(engine)
        self._reports: deque[samples_pb2.StatisticsReport] = deque(maxlen=REPORTS_WAITING)
        self.outbox = Outbox(self.directory.outbox, s.outbox.limit_bytes, later=True)
        self._closing.callback(self.outbox.close)
        self.storage, self.building, self.writing = self._workers()
        self.adaptation = Adaptation(self.factory, self.slot, self._adapter(), self.building, self._keep_report)
        self.link = CloudLink(s, self.bundle, self.directory, self.outbox, self.adaptation, self.heartbeat)
        self._closing.callback(self.link.close)
        if self._disk_answers:
            self.link.restore()
        self.samples = SampleWriter(self.bundle, self.outbox, self.storage, s.engine.samples_waiting)
        if isinstance(self.storage, Worker):
            self.storage.every(RETRY_SECONDS, self.samples.write)
        self.sink = self._sink()
        self._calibration = self._known()
        self.path = self._frame_path()
        self.stream = Stream(
            partial(_open, s, self.bundle), fps=s.source.fps, loop=s.source.loop, max_frames=s.source.max_frames, stop=self.stop
        )
        self._closing.callback(self.stream.close)
        if s.mode == "threads" and self.frames_wait:
            self.building = Waiting()
            self.adaptation.run_on(self.building)
        self.inference = self._inference()
        self.metrics_server = self._metrics_server()
        self._changing: Latest[dict[str, float]] = Latest("numbers", self._changing_numbers, {})
        self._closing.callback(self._changing.close)
        self.board = Board(self.directory.status, self.status, s.metrics.status_s, lambda: self.directory.held)
        self._saved_bank = b""
        self._paced = (time.monotonic(), 0)
        self.final_status: dict[str, Any] = {}

    @property
    def frames_wait(self) -> bool:
        """Whether each frame waits until the adaptation has looked at it: of a file that is replayed as fast as it can be."""
        if self.settings.mode == "inline":
            return True
        waits = self.settings.source.waits
        return self.stream.replayed if waits == "auto" else waits == "yes"

    # ── parts ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin_directory(self) -> bool:
        """False when the disk does not answer: what is read from it at a start is left for later, or left out."""

        def begin() -> None:
            self.directory.check()
            with suppress(StorageError):  # tried again, and said, by the storage worker
                self.directory.lock()

        if bounded("directory", begin, ANSWER_SECONDS):
            return True
        log.warning("The disk of %s does not answer: beginning without it.", self.directory.root)
        return False

    def _hold(self) -> None:
        """Takes the directory; the storage worker's first task, and nothing is written there before. Raises as `lock`.

        Another daemon that holds it, found out only when the disk answers at last, ends this one.
        """
        try:
            self.directory.lock()
        except UsageError as e:
            self._refused = e
            self.outbox.close()
            self.stop.set()
            raise

    def _workers(self) -> tuple[Runner, Runner, Runner]:
        """Storage, building, predictions: apart, since a database that is locked must not hold up the predictions' file."""
        if self.settings.mode == "inline":
            inline = Inline()
            inline.offer(self._hold)
            inline.offer(self.outbox.open)
            return inline, Inline(), inline
        niceness = self.settings.engine.worker_niceness
        storage = Worker("storage", self.settings.engine.samples_waiting, niceness=niceness)
        building = Worker("building", TAPS_WAITING, niceness=niceness)
        writing = Worker("predictions", TAPS_WAITING, niceness=niceness)
        writing.every(self.settings.predictions.flush_ms / 1e3, self._flush)
        storage.offer(self._hold)
        storage.every(RETRY_SECONDS, self._hold)
        storage.every(RETRY_SECONDS, self.outbox.open, at_once=True)
        storage.every(RETRY_SECONDS, self._write_reports)
        storage.every(self.settings.metrics.status_s, self.look_around)
        storage.every(self.settings.metrics.status_s, self.follow_budget)
        storage.every(self.settings.metrics.status_s, self.follow_requests)
        storage.every(BANK_SECONDS, self.save_bank)
        return storage, building, writing

    def _adapter(self) -> Adapter:
        s, classes = self.settings.adapt_settings(), self.bundle.manifest.class_count
        model = StatisticsModel.of(self.bundle, s.mix)
        make = partial(Adapter, model, s, classes, reference=self._reference(), bundle_digest=self.bundle.digest)
        path = self.directory.bank(self.bundle.digest)
        self._bank_unread = not self._disk_answers
        try:
            if self._disk_answers and path.exists():
                with open_regular(path) as f:
                    content = f.read()
                return Adapter.load(content, model, s, classes, **make.keywords)
        except InputError as e:
            self._bank_unread = True
            log.warning("The domain bank %s %s", path, e.message)
        except StorageError as e:
            log.warning("The domain bank %s is not used: %s", path, e)
        except OSError as e:
            self._bank_unread = True
            log.warning("The domain bank %s is not used: %s", path, e)
        return make()

    def _reference(self) -> Reference | None:
        """How the calibration slice looks; without one the adapter takes its first frames for home."""
        images = self._calibration_images()
        return Reference.measure(images) if images is not None and len(images) >= 2 else None

    def _calibration_images(self) -> U8 | None:
        """The bundle's calibration slice, uint8 (N, H, W, 3); None where there is none to read."""
        part = self.bundle.manifest.calibration
        if not part:
            return None
        try:
            with np.load(BytesIO(self.bundle.read(part)), allow_pickle=False) as slice_:
                images: U8 = slice_["images"]
        except (KeyError, ValueError, OSError) as e:
            log.warning("The calibration slice of %s is not readable: %s", self.bundle.path, e)
            return None
        return images

    def _known(self) -> tuple[U8, F32] | None:
        """Calibration images, and what the exported engine says of them; only where something asks for it. Before any swap."""
        s = self.settings.adapt
        images = self._calibration_images() if s.novelty or s.correction == "adanpc" else None
        if images is None or not len(images):
            return None
        images, engine = images[:KNOWN_IMAGES], self.slot.current
        return images, np.concatenate([engine.run_pictures(images[i : i + 1]) for i in range(len(images))])

    def _novelty(self) -> NoveltyGate | None:
        """Without calibration images nothing can be called novel."""
        if not self.settings.adapt.novelty:
            return None
        if self._calibration is None:
            log.warning("adapt.novelty is off: %s has no calibration images to tell what is known.", self.bundle.path)
            return None
        try:
            return NoveltyGate(*self._calibration, HOME)
        except ValueError as e:
            log.warning("adapt.novelty is off: %s.", e)
            return None

    def _corrector(self) -> Corrector | None:
        """Off where no shift would be noticed: a network that begins to answer one class would be taken for a run of it."""
        name = self.settings.adapt.correction
        if name != "off" and not self.adaptation.watches:
            log.warning("adapt.correction is off: for %s of %s nothing notices a shift.", self.factory.target, self.bundle.path)
            return None
        known = self._calibration[1] if self._calibration is not None else None
        return make_corrector(name, self.bundle.manifest.class_count, known)

    def _sink(self) -> JsonLines | None:
        s = self.settings.predictions
        if not s.path:
            return None
        sink = JsonLines(s.path, self.bundle.manifest.classes, limit_bytes=s.limit_mb * 10**6, later=True)
        bounded("predictions", sink.check, ANSWER_SECONDS)
        return sink

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
            corrector=self._corrector(),
            second_look=SecondLook(classes) if self.settings.adapt.second_look else None,
            novelty=self._novelty(),
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
        corrector = self._corrector() if s.observe else None  # requests that are not observed tell nothing of a shift
        requests = RequestCorrector(corrector, lambda: self.adaptation.domain) if corrector else None
        handlers = Handlers(self.bundle, self.slot, s.max_batch, observe, self.factory.runtime.platform, requests)
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
        for worker in (self.storage, self.building, self.writing):
            if isinstance(worker, Worker):
                worker.start()
        self.link.start()
        self.board.start()
        return self

    def run(self) -> int:
        """Serves frames until the source ends or `stop` is set; returns how many were served.

        Raises:
            UsageError: another daemon turned out to hold the directory, whose disk did not answer at the start.
        """
        path, observed, stop = self.path, self._observed, self.stop
        for frame in self.stream:
            if frame is not None:
                path.step(frame)
            if not observed.empty():
                self._look_at_requests(frame is None)
            if stop.is_set():
                break
        self._look_at_requests(True)
        if self._refused is not None:
            raise self._refused
        return path.frames

    def _look_at_requests(self, all_of_them: bool) -> None:
        """Requests that were answered on gRPC's threads: selector and adapter belong to this one."""
        with suppress(Empty):
            while True:
                self._observed.get_nowait()()
                if not all_of_them:
                    return

    def _observe(self, image: U8, logits: F32, serving: ServingState, name: str, started: float, corrected: F32 | None) -> None:
        if self._observed.qsize() >= OBSERVED_WAITING:
            self.observed_dropped += 1
            return
        latency = time.perf_counter() - started
        unix_ms = time.time_ns() // 1_000_000

        def account() -> None:
            frame = Frame(self.path.frames, image, name, unix_ms)
            self.path.account(frame, logits, serving, time.perf_counter() - latency, corrected)

        self._observed.put(account)

    # ── what workers do ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _add_inline(self, prediction: Prediction) -> None:
        """Without a worker that flushes now and then, every so many lines."""
        assert self.sink is not None
        self.sink.add(prediction)
        if prediction.frame % LINES_INLINE == 0:
            self.writing.offer(self._flush)

    def _flush(self) -> None:
        if self.sink is not None:
            self.sink.flush()

    def _keep_report(self, report: samples_pb2.StatisticsReport) -> None:
        """Whoever looks at frames must not wait for the disk either; of one state the newest report counts."""
        self._reports.append(report)
        self.storage.offer(self._write_reports)

    def _write_reports(self) -> None:
        while self._reports:
            report = self._reports.popleft()
            try:
                self.outbox.put_report(report)
            except StorageError:
                if len(self._reports) < REPORTS_WAITING:
                    self._reports.appendleft(report)
                raise

    def save_bank(self) -> None:
        """Keeps the domains met. Raises StorageError: the old file stays.

        A file that could not be read at the start is not replaced: it may hold more than what was met since.
        """
        if not self.directory.held:
            return
        if self._bank_unread and self.directory.bank(self.bundle.digest).is_file():
            return
        content = self.adaptation.dump()
        if content != self._saved_bank:
            write_atomically(self.directory.bank(self.bundle.digest), [content])
            self._saved_bank = content

    def look_around(self) -> None:
        """Takes up an identity that somebody put into the data directory."""
        self.link.look_around()

    def follow_requests(self) -> None:
        """A rollback asked for on the device itself."""
        self.link.requests.look()

    def follow_budget(self) -> None:
        """Keeps no more frames than the hour's bytes can carry: what the outbox would evict need not wear out a card."""
        now, frames = time.monotonic(), self.path.frames
        elapsed, served = now - self._paced[0], frames - self._paced[1]
        self._paced = (now, frames)
        waiting, held = len(self.outbox), self.outbox.bytes
        each = held / waiting if waiting else float(np.prod(self.bundle.preprocess.shape))
        more = room(self.link.available_bytes(), held, each)
        if isinstance(self.path.selector, NewDomainSelector):
            self.path.selector.allow(more)
        if self.path.novelty is not None:
            self.path.novelty.allow(more)
        selector = innermost(self.path.selector)
        if isinstance(selector, BudgetSelector) and waiting and served > 0:
            rate = rate_within(self.settings.outbox.budget, held / waiting, served / max(elapsed, 1e-3))
            selector.set_rate(min(selector.settings.rate, rate))

    # ── what it says of itself ──────────────────────────────────────────────────────────────────────────────────────────

    def _changing_numbers(self) -> dict[str, float]:
        """What is behind locks that are held while a model changes."""
        return {**self.adaptation.metrics(), **self.link.metrics()}

    def metrics(self) -> dict[str, float]:
        """A flat snapshot; any thread. Waits for no disk and no change of the model."""
        values = {
            **self.path.metrics(),
            **self._changing.get(),
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

    def problems(self) -> list[str]:
        """Everything that is wrong now, a sentence each; waits for nothing."""
        told = [self.link.last_error]
        for runner, name in ((self.storage, "storage"), (self.writing, "predictions")):
            told.append(runner.last_error)
            if runner.waiting_s > STUCK_SECONDS:
                told.append(f"The {name} worker has waited {runner.waiting_s:.0f} s for the disk or a lock; frames go on.")
        told += [self.building.last_error, self._changing.error, self.board.problem]
        return list(dict.fromkeys(sentence for sentence in told if sentence))

    def error(self) -> str:
        """The first of `problems`; empty when nothing is wrong."""
        return next(iter(self.problems()), "")

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
            "frames_wait": self.frames_wait,
            "looks_dropped": self.adaptation.frames_unwatched,
            "last_skipped": self.stream.last_skipped,
            "last_error": self.error(),
            "problems": self.problems(),
            "running": True,
            "metrics": self.metrics(),
        }

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def __exit__(self, *exc: object) -> None:
        """Writes everything that waits, then lets go. An error of the disk is logged: it cannot be helped any more.

        A disk that does not answer is waited for until ENDING_SECONDS after the stop, then what waits for it is given up.
        """
        self.stop.set()
        end = time.monotonic() + ENDING_SECONDS
        with _said("inference"):
            if self.inference is not None:
                self.inference.close()
        self.link.stop()
        for worker in (self.building, self.storage, self.writing):
            worker.close(max(end - time.monotonic(), 0.1))
        if isinstance(self.building, Worker) and not self.building.ended:
            self.adaptation.stop()
            self.building.close(max(end - time.monotonic(), 2.0))
        if not bounded("saving", self._save, max(end - time.monotonic(), 1.0)):
            log.warning("The disk does not answer: what waits for it at the end is given up.")
        self.final_status = dict(self.board.close(patience=1.0))
        bounded("closing", self._closing.close, max(end - time.monotonic(), 1.0))
        sys.setswitchinterval(self._switch_interval)
        gc.unfreeze()

    def _save(self) -> None:
        with _said("samples"):
            self.samples.close()
        with _said("statistics"):
            self._write_reports()
        with _said("predictions"):
            if self.sink is not None:
                self.sink.close()
        with _said("domain bank"):
            self.save_bank()


@contextmanager
def _said(what: str) -> Iterator[None]:
    try:
        yield
    except RefoldError as e:
        log.warning("At the end, %s: %s", what, e)


def _open(settings: EdgeSettings, bundle: Bundle) -> Source:
    return open_source(settings.source.path, bundle.preprocess, watch=settings.source.watch)
