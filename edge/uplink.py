"""Everything a device says to the cloud, on threads of its own; a dead cloud delays it and loses nothing.

    uplink = Uplink(settings, identity, outbox, budget, callbacks, bundle_digest=bundle.digest)
    uplink.start();  uplink.close()                 close: under a second, even in a long poll

    callbacks = Callbacks(
        version=lambda: updater.version,            of the release in use
        follow=updater.follow,                      called on the poll thread with each answer
        heartbeat=lambda: fleet_pb2.HeartbeatRequest(state=..., domain=..., metrics=..., last_error=...))

    samples      outbox ─► offer headers ─► upload what is wanted, in batches ─► forget
    statistics   outbox ─► upload ─► forget
    poll         long poll ─► follow
    heartbeat    status ─► interval, and a hint that there is a newer release

Each is a loop that backs off by itself (edge/loops.py); every call has a deadline (edge/channel.py). All requests may be
repeated: samples are named by content, reports by digest. Bytes are counted before they are sent, overhead included;
samples and statistics wait for the budget (edge/budget.py), heartbeats and polls never do.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.budget import ByteBudget
from edge.channel import DEAD, Link
from edge.enrol import Identity, renew
from edge.link_settings import LinkSettings
from edge.loops import Backoff, BusyError, Loop, Pause
from edge.outbox import Outbox
from edge.updater import Outcome
from refold.errors import InputError, NetworkError, RefoldError, StorageError
from refold.v1 import adaptation_pb2 as pb
from refold.v1 import fleet_pb2, samples_pb2

__all__ = ["Callbacks", "Uplink", "wire_bytes"]

log = logging.getLogger(__name__)

HANDSHAKE_BYTES = 2048  # what a client sends to set up mutual TLS with P-256 certificates
CALL_BYTES = 320  # HTTP/2 headers, frames and TLS records of a small unary call
LONGEST_S = 3600.0  # of any pause the cloud asks for
IDLE_S = 600.0  # a look even if nobody woke the loop
NOT_FOR_EVER = frozenset({"storage", "quota", "busy", "internal"})  # refusals after which a sample is kept
HEADER_BYTES = 400  # of a sample, twice on the wire: once offered, once uploaded


@dataclass(frozen=True)
class Callbacks:
    """What the uplink asks of the daemon; each is called on one of the uplink's threads."""

    version: Callable[[], int]
    follow: Callable[[pb.PollReleaseResponse], Outcome]
    heartbeat: Callable[[], fleet_pb2.HeartbeatRequest]


def wire_bytes(message: Any) -> int:
    """Bytes a request costs on the wire, never less than what is sent (measured through a counting proxy)."""
    size = int(message.ByteSize())
    return size + CALL_BYTES + size // 128


class Uplink:
    """Threads between the outbox, the updater and the cloud.

    Args:
        settings: addresses, intervals and sizes.
        identity: from `edge.enrol`.
        directory: where a renewed identity is saved; None: no renewal.
    """

    def __init__(
        self,
        settings: LinkSettings,
        identity: Identity,
        outbox: Outbox,
        budget: ByteBudget,
        callbacks: Callbacks,
        *,
        bundle_digest: str,
        directory: Path | None = None,
    ) -> None:
        self.settings = settings
        self._identity, self._directory = identity, directory
        self._outbox, self._budget, self._callbacks = outbox, budget, callbacks
        self._bundle_digest = bundle_digest
        self._link = Link(settings.address, identity, settings.server_name, self._back)
        self._lock = threading.Lock()
        self._counts: dict[str, float] = dict.fromkeys(COUNTS, 0)
        self._errors: dict[str, str] = {}
        self._disk_errors: set[str] = set()  # whose present error is one of this device's disk
        self._refusal = ""
        self._away = False
        self._offered = settings.offer
        self._batch = settings.batch_bytes
        self._passed_over = 0
        self._refused = Backoff(settings.refused_first_s, settings.refused_most_s)
        self._samples = self._loop("samples", self._send_samples)
        self._statistics = self._loop("statistics", self._send_statistics)
        self._poll = self._loop("poll", self._poll_release)
        self._heartbeat = self._loop("heartbeat", self._beat)
        self._loops = (self._samples, self._statistics, self._poll, self._heartbeat)
        outbox.subscribe(self.wake)

    def _loop(self, name: str, step: Callable[[], Pause]) -> Loop:
        backoff, thread = Backoff(self.settings.retry_first_s, self.settings.retry_most_s), f"uplink-{name}"

        def stepping() -> Pause:
            pause = step()
            with self._lock:
                if thread in self._disk_errors:  # a step that needed the disk and no call is over that error as well
                    self._disk_errors.discard(thread)
                    self._errors.pop(thread, None)
            return pause

        return Loop(thread, stepping, backoff, self._failed)

    def start(self) -> None:
        for loop in self._loops:
            loop.start()

    def wake(self) -> None:
        """Something was put into the outbox."""
        self._samples.wake()
        self._statistics.wake()

    def close(self, seconds: float = 0.9) -> bool:
        """Stops all threads, cancelling calls; True when all ended in time. What was not acknowledged stays in the outbox."""
        for loop in self._loops:
            loop.stop()
        self._link.close()
        end = time.monotonic() + seconds
        for loop in self._loops:
            loop.join(max(end - time.monotonic(), 0.0))
        return all(loop.join(0.0) for loop in self._loops)

    @property
    def last_error(self) -> str:
        """The sentence of a failure that has not been followed by a success of its kind, or of the last release's refusal."""
        with self._lock:
            return next(reversed(self._errors.values()), self._refusal)

    def metrics(self) -> dict[str, float]:
        """Counts since the start (see COUNTS), and `connected`: 1 when the latest call that ended got an answer."""
        with self._lock:
            return {"connected": float(self._link.up), **self._counts}

    def _count(self, **by: float) -> None:
        with self._lock:
            for name, n in by.items():
                self._counts[name] += n

    def _failed(self, name: str, error: RefoldError) -> None:
        with self._lock:
            before = self._errors.pop(name, "")
            away = error.code in DEAD and self._away  # gRPC's reasons for one dead cloud change from try to try
            self._away = error.code in DEAD
            news = before != error.message and not (away and before)
            self._errors[name] = error.message
            self._counts["failures"] += 1
            (self._disk_errors.add if isinstance(error, StorageError) else self._disk_errors.discard)(name)
        (log.warning if news else log.debug)("%s: %s", name, error.message)

    # ── one call ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _call(self, service: str, method: str, request: Any, *, must: bool, wait: float = 0.0) -> Any:
        """Counts the bytes and sends.

        Raises:
            _NotYetError: the hour's bytes are spent or the cloud is away, and the call may wait (`must` is False).
        """
        size, was_up = wire_bytes(request), self._link.up
        if not must:
            if not was_up:  # heartbeats and polls knock; what costs more waits until they are let in
                raise _NotYetError(math.inf)
            if not self._budget.spend(size):
                raise _NotYetError(self._budget.seconds_until(size))
        elif was_up:
            self._charge(size)
        deadline = self.settings.deadline_s + wait + size / self.settings.slowest_bytes_per_s
        try:
            response = self._link.call(service, method, request, deadline)
        finally:
            if must and not was_up and self._link.up:  # to a cloud that is away nothing was sent
                self._charge(size)
        with self._lock:
            self._counts["bytes_up"] += size
            self._counts["bytes_down"] += response.ByteSize()
            self._errors.pop(threading.current_thread().name, None)
        return response

    def _back(self) -> None:
        """The cloud answers, again: what waited for that goes on."""
        self._charge(HANDSHAKE_BYTES)
        self.wake()

    def _charge(self, n: int) -> None:
        with suppress(StorageError):  # a full disk must not silence a device
            self._budget.charge(n)

    # ── samples ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _send_samples(self) -> Pause:
        waiting = self._outbox.bytes
        if not waiting:
            return Pause(IDLE_S)
        if waiting < self.settings.batch_bytes:
            self._samples.pause(self.settings.linger_s)
        try:
            return self._offer()
        except _NotYetError as e:
            return e.pause

    def _offer(self) -> Pause:
        headers = self._affordable()
        if not headers:
            return Pause(IDLE_S)
        try:
            answer = self._call("adaptation", "OfferSamples", pb.OfferSamplesRequest(headers=headers), must=False)
        except InputError as e:
            return self._narrow(headers, e)
        self._offered = self.settings.offer
        self._outbox.forget(answer.unwanted)
        done = len(answer.unwanted)
        self._count(samples_offered=len(headers), samples_unwanted=len(answer.unwanted))
        sizes = {h.digest: h.size + HEADER_BYTES for h in headers}
        for batch in _batches([d for d in answer.wanted if d in sizes], sizes, self._batch):
            if self._samples.stopped():
                return Pause(0)
            done += self._upload(batch)
        if answer.retry_after_ms:
            return Pause(_bounded(answer.retry_after_ms), wakeable=False)
        if not done:
            raise NetworkError("The cloud neither took nor refused what it was offered.", code="no-progress")
        return Pause(0)

    def _narrow(self, headers: list[samples_pb2.SampleHeader], error: InputError) -> Pause:
        """An offer that is not accepted at all: one header is to blame, found by offering one at a time."""
        if len(headers) == 1:
            log.warning("The cloud does not accept the offer of sample %s: %s", headers[0].digest[:12], error.message)
            self._outbox.forget([headers[0].digest])
            self._count(samples_refused=1)
        self._offered = 1
        return Pause(self.settings.poll_pause_s, wakeable=False)

    def _affordable(self) -> list[samples_pb2.SampleHeader]:
        """The best headers whose samples fit the rest of the hour; drops what no hour can hold."""
        left = self._budget.available()
        whole = self._budget.bytes_per_hour
        while True:
            limit = None if left is None else max(left - 2 * CALL_BYTES, 0)
            headers = self._outbox.headers(self._offered)
            if not headers or limit is None:
                return headers
            costs = [_cost(h) for h in headers]
            if whole and costs[0] + 2 * CALL_BYTES > whole:
                log.warning("A sample of %d bytes is larger than the hourly budget of %d: dropped.", headers[0].size, whole)
                self._outbox.forget([headers[0].digest])
                self._count(samples_dropped=1)
                continue
            fitting = 0
            for cost in costs:
                limit -= cost
                if limit < 0:
                    break
                fitting += 1
            if not fitting:
                raise _NotYetError(self._budget.seconds_until(costs[0] + 2 * CALL_BYTES))
            return headers[:fitting]

    def _upload(self, digests: list[str]) -> int:
        """Sends one batch; returns how many samples are done with."""
        samples = self._outbox.samples(digests)
        if not samples:
            return len(digests)
        try:
            answer = self._call("adaptation", "UploadSamples", pb.UploadSamplesRequest(samples=samples), must=False)
        except InputError as e:
            if len(samples) > 1:  # one of them poisons the batch
                return sum(self._upload([s.header.digest]) for s in samples)
            log.warning("The cloud refuses sample %s: %s", digests[0][:12], e.message)
            self._count(samples_refused=1)
            return self._outbox.forget(digests)
        except (_NotYetError, BusyError):
            raise
        except NetworkError:
            if self._link.up:  # the cloud stumbles over something in here: smaller steps, and others first
                self._batch = max(self._batch // 4, 1)
                self._outbox.demote(digests)
            raise
        self._batch = min(self._batch * 4, self.settings.batch_bytes)
        final = [r for r in answer.refused if r.code not in NOT_FOR_EVER]
        for refusal in final:
            log.warning("The cloud refuses sample %s: %s", refusal.digest[:12], refusal.message)
        self._count(samples_uploaded=len(answer.stored), samples_refused=len(final))
        self._outbox.forget([*answer.stored, *(r.digest for r in final)])
        if len(final) < len(answer.refused):
            raise BusyError("The cloud cannot store more samples now.", self.settings.retry_most_s)
        return len(answer.stored) + len(final)

    # ── statistics ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _send_statistics(self) -> Pause:
        for report in self._outbox.reports(1):
            try:
                self._call("adaptation", "UploadStatistics", pb.UploadStatisticsRequest(report=report), must=False)
                self._count(statistics_uploaded=1)
            except _NotYetError as e:
                return e.pause
            except InputError as e:
                log.warning("The cloud refuses a statistics report: %s", e.message)
                self._count(statistics_refused=1)
            self._outbox.forget_report(report.digest)
            return Pause(0)
        return Pause(IDLE_S)

    # ── releases ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _poll_release(self) -> Pause:
        """One long poll.

        A release this device refuses must not stand in the way of the next one (releases for several domains come one after
        another): from then on polls name the refused version as installed, until the cloud answers with an older one.
        """
        began, wait, runs = time.monotonic(), self.settings.poll_wait_s, self._callbacks.version()
        request = pb.PollReleaseRequest(
            bundle_digest=self._bundle_digest,
            cohort=self._identity.cohort,
            installed_version=max(runs, self._passed_over),
            wait_ms=int(wait * 1000),
        )
        response = self._call("adaptation", "PollRelease", request, must=True, wait=wait)
        self._count(polls=1)
        if not response.use_exported and not response.HasField("release"):
            quick = time.monotonic() - began < min(wait, 1.0)
            return Pause(max(_bounded(response.next_in_ms), self.settings.poll_pause_s if quick else 0.0))
        outcome = self._callbacks.follow(response)
        passed_over, self._passed_over = self._passed_over, outcome.refused
        self._refusal = outcome.error.message if outcome.error else ""
        if outcome.settled and (outcome.version != runs or passed_over):
            self._refused.reset()
            self._count(releases=outcome.version != runs)
            self._heartbeat.wake()
            return Pause(0)
        self._count(releases_refused=1)
        if outcome.refused > passed_over:
            return Pause(max(self.settings.poll_pause_s, _bounded(response.next_in_ms)), wakeable=False)
        # The same answer would come again at once: nothing genuine, a full disk, or a cloud that does not listen.
        return Pause(max(self._refused.next(), _bounded(response.next_in_ms)), wakeable=False)

    # ── heartbeat ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _beat(self) -> Pause:
        if self.settings.renew and self._directory and self._link.up and self._identity.is_due(time.time()):
            self._renew(self._directory)
        request = fleet_pb2.HeartbeatRequest()
        request.CopyFrom(self._callbacks.heartbeat())
        request.bundle_digest, request.release_version = self._bundle_digest, self._callbacks.version()
        answer = self._call("fleet", "Heartbeat", request, must=True)
        self._count(heartbeats=1)
        if answer.latest_release_version != request.release_version:
            self._poll.wake()
        wanted = _bounded(answer.next_in_ms, least=1.0) if answer.next_in_ms else self.settings.heartbeat_s
        return Pause(wanted * random.uniform(0.7, 1.0))  # early rather than late, and not the whole fleet at once

    def _renew(self, directory: Path) -> None:
        try:
            self._identity = renew(self._identity, self.settings, directory)
            self._link.reset(self._identity)
            with self._lock:
                self._errors.pop("uplink-renew", None)
        except RefoldError as e:
            self._failed("uplink-renew", e)


COUNTS = (
    "failures", "bytes_up", "bytes_down", "heartbeats", "polls", "releases", "releases_refused",
    "samples_offered", "samples_unwanted", "samples_uploaded", "samples_refused", "samples_dropped",
    "statistics_uploaded", "statistics_refused",
)  # fmt: skip


class _NotYetError(NetworkError):
    """No failure: the hour's bytes are spent, or the cloud is away. Worth another look after `seconds`, or when woken."""

    def __init__(self, seconds: float) -> None:
        super().__init__("Nothing is sent now.")
        self.pause = Pause(min(seconds, IDLE_S), wakeable=math.isinf(seconds))


def _bounded(milliseconds: int, least: float = 0.0) -> float:
    """Seconds the cloud asks for: neither a stampede nor a farewell."""
    return min(max(milliseconds / 1000, least), LONGEST_S)


def _cost(header: samples_pb2.SampleHeader) -> int:
    """Bytes of a sample and its header, offered and uploaded."""
    size = header.size + 2 * header.ByteSize() + 32
    return int(size + math.ceil(size / 128))


def _batches(digests: list[str], sizes: dict[str, int], limit: int) -> list[list[str]]:
    batches: list[list[str]] = []
    room = 0
    for digest in digests:
        if not batches or sizes[digest] > room:
            batches.append([])
            room = limit
        batches[-1].append(digest)
        room -= sizes[digest]
    return batches
