"""One worker: evidence of one (bundle, cohort) in, judged candidates out. Runs in a process of its own, where torch is loaded.

Everything it knows it can learn again from the store, so its death costs nothing: buffers are rebuilt from the stored evidence,
and what the newest decision of a domain has already seen does not count as new.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloud.bundles import open_stored
from cloud.gate import HOME, Gate
from cloud.gating.kept import Kept, keep
from cloud.gating.verdict import GateResult
from cloud.lesson import Candidate, Lesson, find_maker
from cloud.logs import set_up
from cloud.pictures import decode_picture
from cloud.releases import Outcome
from cloud.settings import GateSettings, WorkerSettings
from cloud.store import DirectoryObjects, SampleRecord, Store
from cloud.store.store import GOOD
from cloud.training.answers import asked
from cloud.training.waiting import Waiting, look
from refold.bundle import Bundle
from refold.errors import RefoldError, UsageError
from refold.release import Release, decode, encode
from refold.v1 import norms_pb2
from refold.v1 import samples_pb2 as pb

__all__ = ["Job", "Worker", "work"]

log = logging.getLogger(__name__)
CHUNK = 256  # rows read at once
POPULATION = 128  # newest random samples of a domain, on which the gate measures what a device makes of it alone
LINGER_S = 0.2  # after a wake-up, so that one upload of many samples is seen whole


@dataclass(frozen=True)
class Job:
    """All a worker is told; picklable."""

    database: str
    objects: Path
    bundle_digest: str
    cohort: str
    workers: WorkerSettings
    gate: GateSettings
    distil: dict[str, object]
    log_level: str = "WARNING"
    log_json: bool = False


class Worker:
    """The work itself, without a process around it.

    Args:
        lesson: the distiller and its teachers, fresh: buffers are filled here.
    """

    def __init__(self, job: Job, store: Store, objects: DirectoryObjects, bundle: Bundle, lesson: Lesson) -> None:
        self._job, self._store, self._objects, self._bundle, self._lesson = job, store, objects, bundle, lesson
        self._gate = Gate(bundle, job.gate, threads=job.workers.threads)
        self._generation = store.generation(bundle.digest, job.cohort)  # first of all: what is read later may know a rollback
        self._samples_upto = self._statistics_upto = 0
        self._consumed = store.consumed(bundle.digest, job.cohort)
        self._fresh: Counter[str] = Counter()
        self._tried: dict[str, float] = {}
        self._population: dict[str, deque[NDArray[np.uint8]]] = {}
        self._kept: dict[str, Kept] = {}
        self._counts: dict[str, int] = {}
        self._counted = -1
        self.damaged = 0

    @property
    def _key(self) -> tuple[str, str]:
        return self._bundle.digest, self._job.cohort

    # Evidence ----------------------------------------------------------------------------------------------------------------

    def absorb(self) -> int:
        """Takes in everything stored since the last time; returns how many rows that were."""
        before = self._samples_upto + self._statistics_upto
        while reports := self._store.statistics_after(*self._key, self._statistics_upto, CHUNK):
            for row in reports:
                report = pb.StatisticsReport.FromString(row.payload)
                try:
                    self._lesson.distiller.add_statistics(report)
                except RefoldError as e:
                    log.warning("report %s is not used: %s", row.digest[:12], e.message)
                else:
                    self._fresh[row.domain] += row.id > self._consumed.get(row.domain, (0, 0))[1]
            self._statistics_upto = reports[-1].id
        while rows := self._store.samples_after(*self._key, self._samples_upto, CHUNK):
            for domain in sorted({r.domain for r in rows}):
                self._teach([r for r in rows if r.domain == domain and not r.held_back], domain)
            self._samples_upto = rows[-1].id
        return self._samples_upto + self._statistics_upto - before

    def _teach(self, rows: Sequence[SampleRecord], domain: str) -> None:
        images, unbiased, used = self._pictures(rows)
        if not len(images):
            return
        self._lesson.distiller.add_samples(images, domain, unbiased)
        self._population.setdefault(domain, deque(maxlen=POPULATION)).extend(images[unbiased])
        seen = self._consumed.get(domain, (0, 0))[0]
        self._fresh[domain] += sum(r.id > seen for r in used)

    def _pictures(self, rows: Sequence[SampleRecord]) -> tuple[NDArray[np.uint8], NDArray[np.bool_], list[SampleRecord]]:
        """Pixels of stored samples: uint8 (N, height, width, 3), unbiased bool (N,), and the rows that could be read."""
        images, unbiased, used = [], [], []
        for row in rows:
            header = pb.SampleHeader.FromString(row.header)
            try:
                images.append(decode_picture(header.codec, self._objects.get(row.digest), header.width, header.height))
            except RefoldError as e:  # collected meanwhile, or damaged on disk: one sample less
                self.damaged += 1
                log.info("sample %s is left out: %s", row.digest[:12], e.message)
                continue
            unbiased.append(header.unbiased)
            used.append(row)
        pre = self._bundle.preprocess
        stacked = np.stack(images) if images else np.zeros((0, pre.height, pre.width, 3), np.uint8)
        return stacked, np.array(unbiased, np.bool_), used

    # Decisions ---------------------------------------------------------------------------------------------------------------

    def due(self, now: float) -> list[str]:
        """Domains to train: ready, with evidence that no decision has seen, long enough after the last try, and judgeable.

        Home comes last: there the exported norms are at their best, and the other domains wait for theirs.
        """
        domains = []
        for domain in self._lesson.distiller.ready():
            if domain == HOME and not self._job.workers.home:
                continue
            waited = now - self._tried.get(domain, -float("inf"))
            if self._fresh[domain] and waited >= self._job.workers.interval_s and self._judgeable(domain):
                domains.append(domain)
        domains += [d for d, kept in self._kept.items() if d not in domains and kept.due(self._held_out(d))]
        return sorted(domains, key=lambda domain: domain == HOME)

    def _held_out(self, domain: str) -> int:
        """Stored held-out samples of a domain, `held_back_most` at most; counted anew when samples have come."""
        if self._counted != self._samples_upto:
            self._counts.clear()
            self._counted = self._samples_upto
        if domain not in self._counts:
            self._counts[domain] = len(self._store.held_back(*self._key, domain or None, self._job.gate.held_back_most))
        return self._counts[domain]

    def _judgeable(self, domain: str) -> bool:
        return self._held_out(domain) >= self._job.gate.held_back

    def waiting(self) -> list[Waiting]:
        """What every domain still lacks before its next training or judgement."""
        return look(self._lesson.distiller, self._held_out, self._kept, self._job.gate, home=self._job.workers.home)

    def decide(self, domain: str, now: float) -> Outcome:
        """Has the gate judge a new candidate of the domain, or the kept one. Never raises for a bad one: it is refused."""
        before = self._kept.pop(domain, None)
        if domain in self._lesson.distiller.ready() and self._fresh[domain]:
            before = None  # what a new training brings forth has seen more
        try:
            candidate = before.candidate if before is not None else self._train(domain, now)
            held_out = self._held_out(domain)
            result, kept = keep(candidate, self._judge(candidate, domain), held_out, before, self._job.gate)
            payload = encode(self._release(candidate, result))
        except RefoldError as e:
            result, kept = GateResult.refused(e.message), None
            payload = encode(Release(self._bundle.digest, self._job.cohort, 0, {}, domain=domain))
        if kept is not None:
            self._kept[domain] = kept
        reason = "; ".join(result.reasons)
        seen = (0, 0) if result.undecided else (self._samples_upto, self._statistics_upto)
        return Outcome(payload, result.passed, reason, *seen, generation=self._generation, undecided=result.undecided)

    def _train(self, domain: str, now: float) -> Candidate:
        self._tried[domain] = now
        self._fresh[domain] = 0
        current = self._current(domain)
        own = current.states if current is not None and current.domain == domain else {}
        return self._lesson.distiller.train(domain, own)

    def _judge(self, candidate: Candidate, domain: str) -> GateResult:
        rows = self._store.held_back(*self._key, domain or None, self._job.gate.held_back_most)
        images, unbiased, _ = self._pictures(rows)
        if unbiased.sum() >= self._job.gate.held_back:  # the selector's own choices are no fair sample of the domain
            images = images[unbiased]
        teachers, classes = self._lesson.teachers, int(self._bundle.manifest.class_count)
        votes = asked(teachers, images, domain, classes, "of this bundle") if teachers is not None and len(images) else None
        population = np.concatenate([np.stack([*self._population[domain]]), images]) if self._population.get(domain) else images
        return self._gate.judge(candidate, self._current(domain), images, votes, population)

    def _current(self, domain: str) -> Release | None:
        """What devices serve in this domain now: its newest good release, else the newest one without a domain."""
        good = [r for r in self._store.releases(*self._key) if r.state == GOOD and r.domain in (domain, "")]
        if not good:
            return None
        best = max(good, key=lambda r: (r.domain == domain, r.version))
        signed = norms_pb2.SignedRelease.FromString(self._store.signed_release(*self._key, best.version))
        return decode(signed.payload)

    def _release(self, candidate: Candidate, result: GateResult) -> Release:
        metrics = {**candidate.metrics, **result.metrics}
        return Release(
            bundle_digest=self._bundle.digest,
            cohort=self._job.cohort,
            version=0,
            states=candidate.states if result.passed else {},
            domain=candidate.domain,
            activations=tuple(candidate.activations),
            samples=candidate.samples,
            statistics_frames=candidate.statistics_frames,
            metrics={k: float(v) for k, v in metrics.items()},
        )


def work(job: Job, link: connection.Connection, *, own_process: bool = True) -> None:
    """A worker's life, until it is told to stop or its parent is gone.

    Over `link` come "wake" and "stop"; back go ("status", text), ("waiting", [Waiting]), ("outcome", Outcome) and, if it cannot
    begin, ("fatal", text).
    """
    if own_process:
        _settle_in(job)
    try:
        store = Store(job.database)
        objects = DirectoryObjects(job.objects)
        record = store.bundle(job.bundle_digest)
        if record is None:
            raise UsageError(f"Bundle {job.bundle_digest[:12]} is not known here.")
        link.send(("status", "loading the student and its teachers"))
        bundle = open_stored(objects, record)
        lesson = find_maker(job.workers.distiller)(bundle, record.teachers, job.distil, threads=job.workers.threads)
        worker = Worker(job, store, objects, bundle, lesson)
    except RefoldError as e:
        with suppress(OSError):  # the service may be gone
            link.send(("fatal", e.message))
        return
    try:
        _loop(job, link, worker)
    except (EOFError, BrokenPipeError):
        log.info("the service is gone")
    finally:
        store.close()


def _loop(job: Job, link: connection.Connection, worker: Worker) -> None:
    while True:
        worker.absorb()
        due = worker.due(time.monotonic())
        if due:
            link.send(("status", f"training {due[0] or 'all domains'}"))
            link.send(("outcome", worker.decide(due[0], time.monotonic())))
        if link.poll() and link.recv() == "stop":
            return
        if due:
            continue
        link.send(("waiting", worker.waiting()))
        if not link.poll(job.workers.look_s):
            continue
        while link.poll():
            if link.recv() == "stop":
                return
        time.sleep(LINGER_S)


def _settle_in(job: Job) -> None:
    """Makes this process a polite one: low priority, few threads, deaf to Ctrl-C, gone with its parent."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(job.workers.threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.nice(job.workers.nice)
    set_up(job.log_level, as_json=job.log_json)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), name="leash", daemon=True).start()


def _die_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(0)
