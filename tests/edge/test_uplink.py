"""The uplink against a real gRPC server with mutual TLS: what is lost, repeated, broken or refused on the way harms nothing."""

from __future__ import annotations

import random
import time

import grpc
import pytest
from cloud_double import RELEASE_KEY, Authority, Cloud, fail, until
from samples_of import report, sample
from tcp_proxy import Proxy

from edge.budget import ByteBudget
from edge.channel import Link
from edge.enrol import Identity
from edge.link_settings import LinkSettings, OutboxSettings, SelectSettings
from edge.loops import Backoff
from edge.outbox import Outbox
from edge.updater import Outcome, Result
from edge.uplink import Callbacks, Uplink
from refold.errors import AccessError, NetworkError, ReleaseError
from refold.v1 import adaptation_pb2 as pb
from refold.v1 import fleet_pb2

AUTHORITY = Authority()
QUICK = {
    "heartbeat_s": 0.2, "poll_wait_s": 2.0, "poll_pause_s": 0.05, "deadline_s": 3.0, "retry_first_s": 0.05, "retry_most_s": 0.2,
    "refused_first_s": 0.1, "refused_most_s": 100.0, "linger_s": 0.02, "batch_bytes": 2048, "renew": True,
}  # fmt: skip


class Device:
    """Outbox, budget and uplink, and a stand-in for the updater that does as it is told."""

    def __init__(self, folder, port, *, budget=None, authority=AUTHORITY, identity=None, **changes):
        self.outbox = Outbox(folder / "outbox.sqlite")
        self.budget = ByteBudget(budget, self.outbox)
        self.identity = identity or authority.identity()
        self.version = 0
        self.answers = []
        self.outcome = None
        self.status = fleet_pb2.HeartbeatRequest(state="running", domain="d0", metrics={"fps": 30.0})
        settings = LinkSettings(**{**QUICK, "address": f"127.0.0.1:{port}", **changes})
        callbacks = Callbacks(lambda: self.version, self.follow, lambda: self.status)
        self.uplink = Uplink(
            settings, self.identity, self.outbox, self.budget, callbacks, bundle_digest="b" * 64, directory=folder
        )

    def follow(self, response):
        self.answers.append(response)
        if self.outcome is not None:
            return self.outcome
        self.version = 0 if response.use_exported else int(response.release.payload)
        return Outcome(Result.INSTALLED, self.version)

    def put(self, *numbers, **kw):
        made = [sample(n, score=0.1 + n / 1000, **kw) for n in numbers]
        self.outbox.put_many(made)
        return [h.digest for h, _ in made]

    def close(self):
        ended = self.uplink.close(5.0)
        self.outbox.close()
        assert ended


@pytest.fixture
def cloud():
    c = Cloud(AUTHORITY)
    c.start()
    yield c
    c.stop()


@pytest.fixture
def make(tmp_path, cloud):
    made = []

    def device(port=None, start=True, **kw):
        d = Device(tmp_path, port or cloud.port, **kw)
        made.append(d)
        if start:
            d.uplink.start()
        return d

    yield device
    for d in made:
        d.close()


# ── samples ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_samples_arrive_once_best_first_in_batches(cloud, make):
    device = make(start=False)
    digests = device.put(*range(40))
    device.uplink.start()
    until(lambda: len(device.outbox) == 0)
    assert set(cloud.samples) == set(digests) and set(cloud.stored.values()) == {1}
    assert cloud.offers[0][0] == digests[-1] and cloud.offers[0] == digests[::-1]
    assert len(cloud.batches) > 5 and max(cloud.batches) < 2 * 2048
    assert device.uplink.metrics()["samples_uploaded"] == 40 and device.uplink.metrics()["connected"] == 1


def test_what_the_cloud_has_or_does_not_want_never_travels(cloud, make):
    device = make(start=False)
    digests = device.put(1, 2, 3)
    cloud.unwanted = set(digests[:2])
    device.uplink.start()
    until(lambda: len(device.outbox) == 0)
    assert set(cloud.samples) == {digests[2]} and device.uplink.metrics()["samples_unwanted"] == 2


def test_samples_put_while_running_are_sent_soon(cloud, make):
    device = make()
    until(lambda: cloud.calls["Heartbeat"])
    for n in range(3):
        device.put(n)
        until(lambda: len(device.outbox) == 0)
    assert len(cloud.samples) == 3


@pytest.mark.parametrize("method", ["OfferSamples", "UploadSamples", "UploadStatistics"])
def test_a_lost_acknowledgement_costs_a_repeat_and_nothing_else(cloud, make, method):
    device = make(start=False)
    digests = device.put(*range(10))
    device.outbox.put_report(report(1))
    cloud.after[method] = [fail(grpc.StatusCode.UNAVAILABLE)] * 3
    device.uplink.start()
    until(lambda: len(device.outbox) == 0 and not device.outbox.reports())
    assert set(cloud.samples) == set(digests) and set(cloud.stored.values()) == {1} and len(cloud.reports) == 1
    assert cloud.calls[method] > 3


def test_a_cloud_that_is_down_loses_nothing_and_is_found_again(cloud, make):
    port = cloud.port
    cloud.stop()
    device = make()
    digests = device.put(*range(5))
    device.outbox.put_report(report(1))
    until(lambda: device.uplink.metrics()["failures"] >= 6)
    assert "cannot be reached" in device.uplink.last_error and device.uplink.metrics()["connected"] == 0
    assert len(device.outbox) == 5 and device.budget.spent() == 0
    cloud.start(port)
    until(lambda: len(device.outbox) == 0 and not device.outbox.reports())
    assert set(cloud.samples) == set(digests)


def test_a_cloud_that_comes_and_goes(cloud, make):
    device = make()
    everything = []
    for round_ in range(3):
        everything += device.put(*range(10 * round_, 10 * round_ + 4))
        until(lambda: len(device.outbox) == 0)
        port = cloud.port
        cloud.stop()
        everything += device.put(*range(10 * round_ + 5, 10 * round_ + 9))
        cloud.start(port)
    until(lambda: len(device.outbox) == 0)
    assert set(cloud.samples) == set(everything) and set(cloud.stored.values()) == {1}


def test_connections_that_break_in_the_middle(cloud, make):
    proxy = Proxy(cloud.port)
    device = make(port=proxy.port)
    digests = device.put(*range(60), size=2000)
    rng = random.Random(0)
    for _ in range(8):
        time.sleep(rng.uniform(0.0, 0.1))
        proxy.cut()
    until(lambda: len(device.outbox) == 0)
    assert set(cloud.samples) == set(digests) and set(cloud.stored.values()) == {1}
    assert proxy.sent <= device.budget.spent()  # repeats and new connections included
    proxy.close()


def test_a_connection_that_goes_silent_is_given_up_at_the_deadline(cloud, make):
    proxy = Proxy(cloud.port)
    device = make(port=proxy.port, deadline_s=0.5, poll_wait_s=0.2)
    until(lambda: cloud.calls["Heartbeat"])
    proxy.passing.clear()
    digests = device.put(1)
    until(lambda: device.uplink.metrics()["failures"])
    assert len(device.outbox) == 1
    proxy.passing.set()
    until(lambda: len(device.outbox) == 0)
    assert set(cloud.samples) == set(digests)
    proxy.close()


def test_an_exhausted_cloud_gets_the_pause_it_asks_for(cloud, make):
    device = make(start=False)
    device.put(1)
    cloud.moods["OfferSamples"] = [fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "Too fast.", refold_retry_ms="700")]
    device.uplink.start()
    until(lambda: len(device.outbox) == 0)
    first, second = cloud.times["OfferSamples"]
    assert second - first >= 0.69


def test_a_quota_in_an_offers_answer_is_honoured(cloud, make):
    device = make(start=False)
    device.put(1)
    cloud.retry_after_ms = 600
    device.uplink.start()
    until(lambda: len(device.outbox) == 0)
    assert cloud.times["OfferSamples"][1] - cloud.times["OfferSamples"][0] >= 0.59


def test_one_bad_sample_does_not_hold_up_the_others(cloud, make):
    device = make(start=False, batch_bytes=100_000)
    digests = device.put(*range(6))

    def picky(context, request):
        cloud.moods["UploadSamples"].append(picky)
        if any(s.header.digest == digests[3] for s in request.samples):
            fail(grpc.StatusCode.INVALID_ARGUMENT, "A picture is broken.")(context, request)

    cloud.moods["UploadSamples"] = [picky]
    device.uplink.start()
    until(lambda: len(device.outbox) == 0)
    assert set(cloud.samples) == set(digests) - {digests[3]} and device.uplink.metrics()["samples_refused"] == 1


def test_one_bad_header_does_not_hold_up_the_others(cloud, make):
    device = make(start=False)
    digests = device.put(*range(5))

    def picky(context, request):
        cloud.moods["OfferSamples"].append(picky)
        if digests[2] in [h.digest for h in request.headers]:
            fail(grpc.StatusCode.INVALID_ARGUMENT, "A header is broken.")(context, request)

    cloud.moods["OfferSamples"] = [picky]
    device.uplink.start()
    until(lambda: len(device.outbox) == 0)
    assert set(cloud.samples) == set(digests) - {digests[2]} and device.uplink.metrics()["samples_refused"] == 1


def test_a_sample_the_cloud_stumbles_over_is_kept_and_overtaken(cloud, make):
    """The server fails (INTERNAL) whenever this sample is in a batch: nobody may lose it, and nobody may wait behind it."""
    device = make(start=False, batch_bytes=100_000)
    digests = device.put(*range(12))
    stone = digests[-1]

    def stumble(context, request):
        cloud.moods["UploadSamples"].append(stumble)
        if any(s.header.digest == stone for s in request.samples):
            fail(grpc.StatusCode.INTERNAL, "Incident 7.")(context, request)

    cloud.moods["UploadSamples"] = [stumble]
    device.uplink.start()
    until(lambda: len(device.outbox) == 1 and len(cloud.samples) == 11)
    assert device.outbox.headers(1)[0].digest == stone
    cloud.moods["UploadSamples"] = []
    until(lambda: stone in cloud.samples)


def test_samples_evicted_on_their_way_count_as_sent(cloud, make):
    device = make(start=False)
    digests = device.put(1, 2)
    cloud.after["UploadSamples"] = [lambda context, request: device.outbox.forget(digests)]
    device.uplink.start()
    until(lambda: device.uplink.metrics()["samples_uploaded"] == 2)
    assert device.uplink.metrics()["failures"] == 0


def test_a_refused_sample_is_forgotten_and_one_over_quota_is_kept(cloud, make):
    device = make(start=False)
    bad, full, good = device.put(1, 2, 3)
    cloud.refusals = {bad: "digest", full: "quota"}
    device.uplink.start()
    until(lambda: device.uplink.metrics()["samples_refused"] and good in cloud.samples)
    until(lambda: len(device.outbox) == 1)
    assert device.outbox.headers(9)[0].digest == full
    cloud.refusals = {}
    until(lambda: full in cloud.samples)


def test_a_cloud_that_neither_takes_nor_refuses_is_not_asked_in_a_hurry(cloud, make):
    device = make(start=False, retry_first_s=50.0, retry_most_s=60.0)
    device.put(1)
    cloud.moods["OfferSamples"] = []
    cloud.OfferSamples = lambda request, context: pb.OfferSamplesResponse()
    cloud.stop()
    cloud.start(cloud.port)
    device.uplink.start()
    until(lambda: "neither took nor refused" in device.uplink.last_error)
    assert len(device.outbox) == 1


# ── the byte budget ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_counted_bytes_are_never_fewer_than_those_on_the_wire(cloud, make):
    proxy = Proxy(cloud.port)
    device = make(port=proxy.port, start=False)
    device.put(*range(50), size=3000)
    device.outbox.put_report(report(1, channels=500))
    device.uplink.start()
    until(lambda: len(device.outbox) == 0 and not device.outbox.reports() and cloud.calls["Heartbeat"] > 5)
    counted = device.budget.spent()
    assert 0.5 * counted < proxy.sent <= counted
    assert proxy.sent > 50 * 3000
    proxy.close()


def test_a_budget_is_not_exceeded_and_the_best_go_first(cloud, make):
    device = make(budget=20_000, start=False, heartbeat_s=100.0, poll_wait_s=100.0)
    digests = device.put(*range(30), size=2000)
    device.uplink.start()
    until(lambda: len(cloud.samples) >= 4)
    until(lambda: (device.budget.available() or 0) < 4000)
    assert device.budget.spent() <= 20_000
    until(lambda: len(device.outbox) == 30 - len(cloud.samples))
    assert set(cloud.samples) == set(digests[-len(cloud.samples) :])


def test_a_budget_of_nothing_silences_samples_but_not_the_device(cloud, make):
    device = make(budget=0, start=False)
    device.put(1)
    device.outbox.put_report(report(1))
    device.uplink.start()
    until(lambda: cloud.calls["Heartbeat"] > 3)
    assert cloud.calls["OfferSamples"] == cloud.calls["UploadStatistics"] == 0
    assert len(device.outbox) == 1 and device.budget.spent() > 0 and device.uplink.metrics()["failures"] == 0


def test_a_sample_no_hour_can_hold_does_not_block_the_rest(cloud, make):
    device = make(budget=12_000, start=False, heartbeat_s=100.0, poll_wait_s=100.0)
    device.put(999, size=20_000)
    small = device.put(1)
    device.uplink.start()
    until(lambda: len(device.outbox) == 0)
    assert set(cloud.samples) == set(small) and device.uplink.metrics()["samples_dropped"] == 1


# ── statistics ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_statistics_go_up_and_are_forgotten(cloud, make):
    device = make(start=False)
    reports = [report(1), report(2, domain="d1"), report(3, version=4)]
    for r in reports:
        device.outbox.put_report(r)
    device.uplink.start()
    until(lambda: not device.outbox.reports())
    assert sorted(cloud.reports) == sorted(r.digest for r in reports)


def test_a_refused_report_is_forgotten(cloud, make):
    device = make(start=False)
    device.outbox.put_report(report(1))
    cloud.moods["UploadStatistics"] = [fail(grpc.StatusCode.INVALID_ARGUMENT, "Another model's.")]
    device.uplink.start()
    until(lambda: not device.outbox.reports())
    assert not cloud.reports and device.uplink.metrics()["statistics_refused"] == 1


# ── releases ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def answer(version):
    response = pb.PollReleaseResponse()
    response.release.payload = str(version).encode()
    return response


def test_a_release_is_followed_and_the_next_poll_says_so(cloud, make):
    cloud.answer_poll = lambda request: answer(request.installed_version + 1) if request.installed_version < 3 else None
    device = make()
    until(lambda: device.version == 3 and cloud.polls[-1].installed_version == 3)
    assert [p.installed_version for p in cloud.polls[:4]] == [0, 1, 2, 3]
    assert cloud.polls[0].cohort == "roof" and cloud.polls[0].bundle_digest == "b" * 64 and cloud.polls[0].wait_ms == 2000
    assert device.uplink.metrics()["releases"] == 3


def test_the_exported_state_may_be_ordered(cloud, make):
    cloud.answer_poll = lambda request: pb.PollReleaseResponse(use_exported=True) if request.installed_version else None
    device = make(start=False)
    device.version = 7
    device.uplink.start()
    until(lambda: device.version == 0)
    assert device.answers[0].use_exported


def test_a_refused_release_is_not_asked_for_in_a_hurry(cloud, make):
    """The cloud answers at once, with the same release, for ever; the device asks again only after longer and longer pauses."""
    cloud.answer_poll = lambda request: answer(9)
    device = make(start=False, refused_first_s=100.0, heartbeat_s=0.05)
    device.outcome = Outcome(Result.REFUSED, 0, ReleaseError("No.", code="canary"))
    cloud.latest = 9  # each heartbeat hints at it as well
    device.uplink.start()
    until(lambda: cloud.calls["Heartbeat"] > 5)
    assert cloud.calls["PollRelease"] == len(device.answers) == 1
    assert device.uplink.metrics()["releases_refused"] == 1 and device.uplink.last_error == "No."


def test_a_refused_release_does_not_stand_in_the_way_of_the_next(cloud, make):
    """Version 5 fails here; the cloud offers the lowest version above the installed one, so the device says it is past 5."""
    versions = [5]
    cloud.answer_poll = lambda request: next((answer(v) for v in versions if v > request.installed_version), None)
    device = make(start=False, refused_first_s=1000.0)
    follow = device.follow

    def picky(response):
        if response.release.payload == b"5":
            return Outcome(Result.REFUSED, device.version, ReleaseError("No.", code="canary"), 5)
        return follow(response)

    device.follow = picky
    device.uplink._callbacks = Callbacks(lambda: device.version, picky, lambda: device.status)
    device.uplink.start()
    until(lambda: cloud.polls and cloud.polls[-1].installed_version == 5)
    assert device.version == 0 and cloud.heartbeats[-1].release_version == 0
    versions.append(6)
    until(lambda: device.version == 6)


def test_a_rollback_below_a_refused_release_is_followed(cloud, make):
    """The device runs 4 and refused 5, so it polls as 5; the cloud takes 5 back, and all is as if it had never been."""
    cloud.answer_poll = lambda request: answer(4) if request.installed_version == 5 else None
    device = make(start=False, refused_first_s=1000.0)
    device.version, device.uplink._passed_over = 4, 5
    device.uplink.start()
    until(lambda: cloud.polls and cloud.polls[-1].installed_version == 4)
    assert device.version == 4 and cloud.calls["PollRelease"] == 2


def test_an_empty_answer_at_once_does_not_make_it_spin(cloud, make):
    cloud.answer_poll = lambda request: pb.PollReleaseResponse()
    make(poll_pause_s=100.0, poll_wait_s=100.0, start=True)
    until(lambda: cloud.calls["Heartbeat"] > 3)
    assert cloud.calls["PollRelease"] == 1


def test_a_heartbeat_that_hints_at_a_release_ends_the_pause(cloud, make):
    cloud.answer_poll = lambda request: answer(5) if cloud.latest == 5 else pb.PollReleaseResponse()
    device = make(poll_pause_s=1000.0)
    until(lambda: cloud.calls["PollRelease"] == 1)
    cloud.latest = 5
    until(lambda: device.version == 5)


def test_closing_ends_a_long_poll_at_once(cloud, make):
    device = make(poll_wait_s=100.0)
    until(lambda: cloud.polls)
    assert device.uplink.close()
    assert device.uplink.close()


def test_closing_ends_a_wait_for_a_cloud_that_is_not_there(make):
    device = make(port=1, deadline_s=100.0, retry_first_s=100.0, retry_most_s=100.0)
    device.put(1)
    assert device.uplink.close()


# ── heartbeats, identity, faults ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_heartbeat_says_what_runs(cloud, make):
    device = make()
    device.version = 4
    until(lambda: cloud.heartbeats and cloud.heartbeats[-1].release_version == 4)
    last = cloud.heartbeats[-1]
    assert (last.state, last.domain, last.bundle_digest, dict(last.metrics)) == ("running", "d0", "b" * 64, {"fps": 30.0})


def test_a_fault_in_the_daemon_does_not_end_a_loop(cloud, make):
    device = make()
    until(lambda: cloud.heartbeats)
    device.status = None  # CopyFrom raises TypeError
    until(lambda: "TypeError" in device.uplink.last_error)
    device.status = fleet_pb2.HeartbeatRequest(state="recovered")
    until(lambda: cloud.heartbeats[-1].state == "recovered")


def test_a_certificate_is_renewed_and_used(cloud, make, tmp_path):
    device = make(identity=AUTHORITY.identity(days=(3.0, 1.0)))
    until(lambda: cloud.enrolments and len(set(cloud.peers)) > 0)
    until(lambda: device.uplink._identity is not device.identity)
    saved = Identity.load(tmp_path)
    assert saved.key_pem != device.identity.key_pem and saved.device_id == "dev-1" and not saved.is_due(time.time())
    assert cloud.enrolments[0].join_token == ""
    serial = f"{__import__('cryptography.x509').x509.load_pem_x509_certificate(saved.certificate_pem).serial_number:x}"
    until(lambda: cloud.peers[-1] == serial)
    assert len(cloud.enrolments) == 1


def test_a_renewal_that_fails_does_not_stop_the_heart(cloud, make):
    cloud.moods["Enroll"] = [fail(grpc.StatusCode.INTERNAL)] * 1000
    device = make(identity=AUTHORITY.identity(days=(3.0, 1.0)))
    until(lambda: len(cloud.heartbeats) >= 2 and device.uplink.metrics()["failures"])


def test_a_server_of_another_authority_is_not_talked_to(cloud, make):
    stranger = Authority("stranger")
    identity = AUTHORITY.identity(trusts=stranger)
    device = make(identity=identity, deadline_s=5.0)
    device.put(1)
    until(lambda: "do not accept each other" in device.uplink.last_error)
    assert not cloud.calls and len(device.outbox) == 1


def test_a_server_that_is_silent_is_not_blamed_for_its_certificate(cloud, make):
    proxy = Proxy(cloud.port)
    proxy.passing.clear()
    device = make(port=proxy.port, deadline_s=0.3, poll_wait_s=0.1)
    until(lambda: device.uplink.last_error)
    assert "certificate" not in device.uplink.last_error
    proxy.close()


def test_a_device_of_another_authority_is_not_heard(cloud, make):
    identity = Authority("stranger").identity(trusts=AUTHORITY)
    device = make(identity=identity, deadline_s=0.5)
    device.put(1)
    until(lambda: device.uplink.metrics()["failures"])
    assert not cloud.calls and len(device.outbox) == 1


def test_a_revoked_device_keeps_its_samples_and_says_why(cloud, make):
    for method in ("OfferSamples", "Heartbeat", "PollRelease"):
        cloud.moods[method] = [
            fail(grpc.StatusCode.PERMISSION_DENIED, "Device dev-1 was revoked.", refold_code="revoked")
        ] * 1000
    device = make()
    device.put(1)
    until(lambda: device.uplink.last_error == "Device dev-1 was revoked.")
    assert len(device.outbox) == 1


def test_errors_have_their_kind_and_code(cloud):
    link = Link(cloud.address, AUTHORITY.identity())
    cases = [
        (grpc.StatusCode.PERMISSION_DENIED, {"refold_code": "revoked"}, AccessError, "revoked"),
        (grpc.StatusCode.UNAUTHENTICATED, {}, AccessError, "unauthenticated"),
        (grpc.StatusCode.FAILED_PRECONDITION, {}, NetworkError, "failed-precondition"),
        (grpc.StatusCode.INTERNAL, {"refold_code": "internal"}, NetworkError, "internal"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, {}, NetworkError, "busy"),
    ]
    cloud.moods["Heartbeat"] = [fail(status, "said", **metadata) for status, metadata, _, _ in cases]
    for _, _, kind, code in cases:
        with pytest.raises(kind) as e:
            link.call("fleet", "Heartbeat", fleet_pb2.HeartbeatRequest(), 5.0)
        assert e.value.code == code
    link.close()
    with pytest.raises(NetworkError, match="closed"):
        link.call("fleet", "Heartbeat", fleet_pb2.HeartbeatRequest(), 5.0)


def test_delays_double_with_jitter_and_stop_growing():
    backoff = Backoff(1.0, 60.0, random.Random(0))
    delays = [backoff.next() for _ in range(12)]
    assert all(min(2.0**i, 60) / 2 <= d <= min(2.0**i, 60) for i, d in enumerate(delays))
    assert len({round(d, 6) for d in delays[6:]}) == 6
    backoff.reset()
    assert backoff.next() <= 1.0


def test_settings_say_what_is_unlimited():
    assert OutboxSettings(bytes_per_hour="unlimited").budget is None and OutboxSettings(bytes_per_hour=5).budget == 5
    assert SelectSettings(options={"rate": 0.1}).name == "budget" and LinkSettings().offer <= 256
    for bad in ({"address": "nowhere"}, {"offer": 1000}, {"unknown": 1}):
        with pytest.raises(ValueError):
            LinkSettings(**bad)


def test_the_release_keys_reach_the_ring():
    assert len(AUTHORITY.identity().ring) == 1 and RELEASE_KEY.public in AUTHORITY.identity().release_keys
