"""The supervisor: one worker per (bundle, cohort) that has evidence, started, woken, restarted, and asked to stop.

Workers train and judge; this side alone signs and stores, so the release key never leaves the server's process.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

from cloud.logs import is_json
from cloud.releases import Outcome, Releases
from cloud.settings import CloudSettings
from cloud.store import DirectoryObjects, Store
from cloud.telemetry import EVIDENCE
from cloud.training.waiting import Waiting, levels, sentence
from cloud.worker import Job, work
from refold.errors import RefoldError

__all__ = ["Keeper", "Supervisor"]

log = logging.getLogger(__name__)
STOP_S = 3.0  # a worker in the middle of a training is not waited for: it loses nothing
TELL_S = 60.0  # between two lines of the log about what a cohort waits for: it changes with every upload
HEALTHY_S = 300.0  # a worker that lived this long starts with a clean record


class Keeper:
    """Keeps one worker alive on a thread of its own."""

    def __init__(self, job: Job, publish: Callable[[Outcome], int]) -> None:
        self._job, self._publish = job, publish
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._link: connection.Connection | None = None
        self._woken = False
        self._process: Any = None
        self._recall = False
        self.status = "starting"
        self.waiting: list[Waiting] = []
        self._told = -math.inf
        self._thread = threading.Thread(target=self._keep, name=f"keeper-{job.cohort}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _hear_waiting(self, waiting: list[Waiting]) -> None:
        text, now = sentence(waiting), time.monotonic()
        news = waiting != self.waiting
        with self._lock:
            self.status, self.waiting, self._woken = text, waiting, False
        EVIDENCE.replace(
            (self._job.bundle_digest, self._job.cohort), levels(self._job.bundle_digest, self._job.cohort, waiting)
        )
        if news and now - self._told >= TELL_S:
            self._told = now
            log.info("%s: %s", self._job.cohort, text)

    def wake(self) -> None:
        """New evidence. One wake-up is enough until the worker has looked."""
        with self._lock:
            if self._link is not None and not self._woken:
                self._woken = self._tell("wake")

    def _tell(self, word: str) -> bool:
        try:
            if self._link is not None:
                self._link.send(word)
                return True
        except OSError:
            pass
        return False

    def renew(self) -> None:
        """After a rollback: a fresh worker, which forgets what it had learnt."""
        with self._lock:
            self._recall = True
            self._tell("stop")
            if self._process is not None and hasattr(self._process, "terminate"):
                self._process.terminate()

    def close(self) -> None:
        self._ended.set()
        with self._lock:
            self._tell("stop")
        self._thread.join(STOP_S)
        if self._process is not None and hasattr(self._process, "kill") and self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._thread.join(STOP_S)

    def _keep(self) -> None:
        failures = 0
        while not self._ended.is_set():
            lived, fatal = self._one_life()
            if self._ended.is_set():
                return
            if self._recall:
                self._recall, failures = False, 0
                continue
            failures = 1 if lived > HEALTHY_S else failures + 1
            if fatal or failures > self._job.workers.restarts:
                self.status = f"stopped: {fatal or 'it crashed too often; see the log, then restart the service'}"
                log.error("The worker of %s %s", self._job.cohort, self.status)
                return
            delay = self._job.workers.restart_s * 2 ** (failures - 1)
            self.status = f"crashed {failures} time(s); starts again in {delay:.0f} s"
            log.warning("The worker of %s %s", self._job.cohort, self.status)
            self._ended.wait(delay)

    def _one_life(self) -> tuple[float, str]:
        """Runs a worker until it ends; returns how long it lived, in seconds, and why it cannot ever run, if so."""
        began = time.monotonic()
        here, there = multiprocessing.Pipe()
        if self._job.workers.mode == "thread":
            runner: Any = threading.Thread(target=_in_thread, args=(self._job, there), name="worker", daemon=True)
            runner.start()
        else:
            runner = multiprocessing.get_context("spawn").Process(
                target=work, args=(self._job, there), name=f"refold-worker-{self._job.cohort}", daemon=True
            )
            runner.start()
            there.close()
        with self._lock:
            self._link, self._process, self._woken = here, runner, False
        fatal = ""
        try:
            while not self._ended.is_set() or here.poll(STOP_S):
                fatal = self._hear(here.recv()) or fatal
        except (EOFError, OSError):
            pass
        with self._lock:
            self._link = None
        here.close()
        runner.join(STOP_S)
        return time.monotonic() - began, fatal

    def _hear(self, message: tuple[str, Any]) -> str:
        kind, content = message
        if kind == "outcome" and self._recall:
            log.info("%s: a candidate from before the rollback is dropped", self._job.cohort)
        elif kind == "outcome":
            try:
                version = self._publish(content)
                log.info("%s: %s", self._job.cohort, f"release {version}" if version else _withheld(content))
            except RefoldError as e:
                if e.code == "stale":
                    log.info("%s: %s", self._job.cohort, e.message)
                    self.renew()
                    return ""
                log.error("A decision for %s could not be stored: %s", self._job.cohort, e.message)
            except Exception:  # a keeper outlives what one candidate brings with it
                log.exception("A decision for %s could not be stored", self._job.cohort)
        elif kind == "fatal":
            return str(content)
        elif kind == "waiting":
            self._hear_waiting(content)
        else:
            with self._lock:
                self.status, self._woken = str(content), False
        return ""


def _withheld(outcome: Outcome) -> str:
    return outcome.reason if outcome.undecided else f"refused: {outcome.reason}"


def _in_thread(job: Job, link: connection.Connection) -> None:
    try:
        work(job, link, own_process=False)
    except Exception:
        log.exception("the worker of %s failed", job.cohort)
    finally:
        link.close()


class Supervisor:
    """All keepers. `notify`, `renew` and `status` may be called from any thread."""

    def __init__(self, settings: CloudSettings, store: Store, objects: DirectoryObjects, releases: Releases) -> None:
        self._settings, self._store, self._objects, self._releases = settings, store, objects, releases
        self._keepers: dict[tuple[str, str], Keeper] = {}
        self._lock = threading.Lock()
        self._look, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._scan, name="supervisor", daemon=True)

    def start(self) -> None:
        if self._settings.workers.mode != "none":
            self._thread.start()

    def notify(self, bundle_digest: str, cohort: str) -> None:
        """New evidence of a cohort."""
        keeper = self._keepers.get((bundle_digest, cohort))
        if keeper is not None:
            keeper.wake()
        else:
            self._look.set()

    def renew(self, bundle_digest: str, cohort: str) -> None:
        """A cohort was rolled back."""
        keeper = self._keepers.get((bundle_digest, cohort))
        if keeper is not None:
            keeper.renew()

    def status(self, bundle_digest: str, cohort: str) -> str:
        if self._settings.workers.mode == "none":
            return "switched off"
        keeper = self._keepers.get((bundle_digest, cohort))
        return keeper.status if keeper else "not started"

    def waiting(self, bundle_digest: str, cohort: str) -> list[Waiting]:
        """What each domain of a cohort lacked when its worker last looked."""
        keeper = self._keepers.get((bundle_digest, cohort))
        return keeper.waiting if keeper else []

    def _scan(self) -> None:
        while not self._ended.is_set():
            try:
                known = {b.digest for b in self._store.bundles()}
                for record in self._store.cohorts():
                    if record.bundle_digest in known and (record.samples or record.statistics_reports):
                        self._ensure(record.bundle_digest, record.cohort)
            except RefoldError as e:
                log.warning("Looking for work failed: %s", e.message)
            except Exception:  # this thread ends with the service, and with nothing else
                log.exception("Looking for work failed")
            self._look.wait(10 * self._settings.workers.look_s)
            self._look.clear()

    def _ensure(self, bundle_digest: str, cohort: str) -> None:
        with self._lock:
            if (bundle_digest, cohort) in self._keepers or self._ended.is_set():
                return
            s = self._settings
            job = Job(
                database=s.storage.database,
                objects=s.storage.objects,
                bundle_digest=bundle_digest,
                cohort=cohort,
                workers=s.workers,
                gate=s.gate,
                distil=dict(s.distil),
                log_level=logging.getLevelName(logging.getLogger().getEffectiveLevel()),
                log_json=is_json(),
            )
            keeper = Keeper(job, self._releases.publish)
            self._keepers[bundle_digest, cohort] = keeper
        keeper.start()

    def close(self) -> None:
        self._ended.set()
        self._look.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            keepers = list(self._keepers.values())
        threads = [threading.Thread(target=k.close) for k in keepers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
