"""The services over real TLS: what devices and operators can do, and how polls are woken."""

from __future__ import annotations

import threading
import time

import grpc
import numpy as np
import pytest
from fleet_of import COHORT, Fleet, pictures, sample, shifted, statistics
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cloud.releases import Outcome, Releases
from refold.bundle import Bundle
from refold.release import Release, encode, open_signed
from refold.signing import KeyRing
from refold.v1 import adaptation_pb2, admin_pb2, fleet_pb2


def outcome(bundle: Bundle, step: int, domain: str = "d1", passed: bool = True) -> Outcome:
    """A candidate that nudges one norm."""
    site = bundle.norms.norms[0]
    state = site.exported.with_statistics(site.exported.mean + np.float32(0.01 * step), site.exported.variance)
    payload = encode(Release(bundle.digest, COHORT, 0, {site.name: state}, domain=domain, samples=step))
    return Outcome(payload, passed, "because", step, step)


def publisher(fleet: Fleet) -> Releases:
    return Releases(fleet.store, fleet.cloud._key, fleet.cloud._board.notify)


def test_a_sample_is_offered_uploaded_and_then_unwanted(fleet: Fleet, small: Bundle) -> None:
    device = fleet.device()
    pair = [sample(small, p) for p in pictures(2)]
    assert list(device.offer(*pair).wanted) == [s.header.digest for s in pair]
    assert list(device.upload(*pair).stored) == [s.header.digest for s in pair]
    answer = device.offer(*pair)
    assert not answer.wanted and sorted(answer.unwanted) == sorted(s.header.digest for s in pair)


def test_the_same_upload_twice_is_stored_once(fleet: Fleet, small: Bundle) -> None:
    device = fleet.device()
    one = sample(small, pictures(1)[0])
    for _ in range(3):
        assert list(device.upload(one, one).stored) == [one.header.digest] * 2
    cohort = fleet.store.cohort(small.digest, COHORT)
    assert cohort is not None and (cohort.samples, cohort.sample_bytes) == (1, one.header.size)


def test_raw_and_webp_samples_decode_to_what_was_sent(fleet: Fleet, small: Bundle) -> None:
    from cloud.pictures import decode_picture

    device = fleet.device()
    image = pictures(1)[0]
    for raw in (True, False):
        one = sample(small, image, raw=raw)
        assert device.upload(one).stored
        payload = fleet.cloud._objects.get(one.header.digest)
        assert np.array_equal(decode_picture(one.header.codec, payload, 16, 16), image)


def test_statistics_are_stored_once_per_digest(fleet: Fleet, small: Bundle) -> None:
    device = fleet.device()
    sites = {s.name: np.zeros(s.channels) for s in small.norms.norms}
    report = statistics(small, sites, {n: v + 1 for n, v in sites.items()})
    for _ in range(2):
        device.adaptation.UploadStatistics(adaptation_pb2.UploadStatisticsRequest(report=report), timeout=20)
    rows = fleet.store.statistics_after(small.digest, COHORT, 0, 10)
    assert [(r.domain, r.frames) for r in rows] == [("d1", 64)]


def test_a_poll_without_news_is_ended_by_the_server(fleet: Fleet, small: Bundle) -> None:
    device = fleet.device()
    answer = device.poll(small, wait_ms=600)
    assert not answer.HasField("release") and not answer.use_exported
    assert answer.next_in_ms == fleet.settings.devices.poll_next_ms


def test_a_release_wakes_a_waiting_poll(fleet: Fleet, small: Bundle) -> None:
    device = fleet.device()
    answers = []
    poll = threading.Thread(target=lambda: answers.append(device.poll(small, wait_ms=20_000)))
    poll.start()
    while not len(fleet.cloud._board):
        time.sleep(0.01)
    version = publisher(fleet).publish(outcome(small, 1))
    poll.join(15)
    release = open_signed(answers[0].release, KeyRing(device.answer.release_keys))
    assert release.version == version == 1 and release.cohort == COHORT and release.domain == "d1"
    assert len(fleet.cloud._board) == 0


def test_a_device_gets_the_newest_release_of_each_domain_in_order(fleet: Fleet, small: Bundle) -> None:
    device, releases = fleet.device(), publisher(fleet)
    for step, domain in enumerate(("d1", "d2", "d1", "d2", "d2"), start=1):
        releases.publish(outcome(small, step, domain))
    ring, installed, seen = KeyRing(device.answer.release_keys), 0, []
    while (answer := device.poll(small, installed)).HasField("release"):
        release = open_signed(answer.release, ring)
        installed = release.version
        seen.append((release.version, release.domain))
    assert seen == [(3, "d1"), (5, "d2")]


def test_devices_follow_a_rollback_and_never_see_that_version_again(fleet: Fleet, small: Bundle) -> None:
    device, operator, releases = fleet.device(), fleet.operator(), publisher(fleet)
    for step in (1, 2, 3):
        releases.publish(outcome(small, step))
    ring = KeyRing(device.answer.release_keys)
    request = admin_pb2.RollbackRequest(bundle_digest=small.digest, cohort=COHORT, to_version=1, reason="worse at night")
    assert operator.admin.Rollback(request, timeout=20).current_version == 1
    assert open_signed(device.poll(small, 3).release, ring).version == 1
    assert not device.poll(small, 1).HasField("release")
    rows = operator.admin.ListReleases(admin_pb2.ListReleasesRequest(), timeout=20).releases
    assert [(r.version, r.state) for r in rows] == [(1, "current"), (2, "rolled-back"), (3, "rolled-back")]
    assert rows[2].reason == "worse at night (operator)"
    assert releases.publish(outcome(small, 4)) == 4
    for installed in (0, 1):
        assert open_signed(device.poll(small, installed).release, ring).version == 4
    assert open_signed(device.poll(small, 3).release, ring).version == 1
    request.to_version = 0
    operator.admin.Rollback(request, timeout=20)
    for installed in (1, 2, 3, 4):
        assert device.poll(small, installed).use_exported
    assert not device.poll(small, 0).use_exported


def test_a_rollback_goes_only_to_an_earlier_good_version(fleet: Fleet, small: Bundle) -> None:
    operator, releases = fleet.operator(), publisher(fleet)
    for step in (1, 2, 3):
        releases.publish(outcome(small, step))
    request = admin_pb2.RollbackRequest(bundle_digest=small.digest, cohort=COHORT, to_version=1)
    operator.admin.Rollback(request, timeout=20)
    for version in (2, 3, 9):
        request.to_version = version
        with pytest.raises(grpc.RpcError) as e:
            operator.admin.Rollback(request, timeout=20)
        assert e.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    request.cohort = "nobody"
    with pytest.raises(grpc.RpcError, match="no release of this bundle"):
        operator.admin.Rollback(request, timeout=20)


def test_a_refused_candidate_is_listed_and_reaches_nobody(fleet: Fleet, small: Bundle) -> None:
    device, operator = fleet.device(), fleet.operator()
    assert publisher(fleet).publish(outcome(small, 1, passed=False)) == 0
    assert not device.poll(small).HasField("release")
    (row,) = operator.admin.ListReleases(admin_pb2.ListReleasesRequest(), timeout=20).releases
    assert (row.version, row.state, row.reason, row.bytes) == (0, "refused", "because", 0)
    assert fleet.store.cohort(small.digest, COHORT).last_gate == "because"  # type: ignore[union-attr]


def test_status_shows_devices_and_cohorts(fleet: Fleet, small: Bundle) -> None:
    device, operator = fleet.device(), fleet.operator()
    device.upload(*[sample(small, p) for p in pictures(3)])
    beat = fleet_pb2.HeartbeatRequest(
        bundle_digest=small.digest, release_version=2, domain="d1", metrics={"fps": 30.0, "bad": float("nan")}, state="running"
    )
    answer = device.fleet.Heartbeat(beat, timeout=20)
    assert answer.next_in_ms == fleet.settings.devices.heartbeat_ms and answer.latest_release_version == 0
    status = operator.admin.Status(admin_pb2.StatusRequest(), timeout=20)
    (row,) = status.devices
    assert (row.device_id, row.cohort, row.release_version, dict(row.metrics)) == (device.id, COHORT, 2, {"fps": 30.0})
    (cohort,) = status.cohorts
    assert (cohort.bundle_name, cohort.cohort, cohort.samples, cohort.distiller) == ("small", COHORT, 3, "switched off")


def test_health_and_reflection_answer(fleet: Fleet) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    channel = fleet.operator().channel
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "refold.v1.Adaptation", "refold.v1.Fleet", "refold.v1.Admin"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (listed,) = stub.ServerReflectionInfo(iter([request]), timeout=20)
    assert "refold.v1.Adaptation" in {s.name for s in listed.list_services_response.service}


def test_readiness_follows_the_disk(fleet: Fleet) -> None:
    assert fleet.cloud._ready()
    fleet.cloud._objects._free = 2**62
    assert not fleet.cloud._ready()


def test_closing_answers_held_polls(tmp_path, small: Bundle) -> None:
    answers = []
    with Fleet(tmp_path / "f", {"REFOLD_CLOUD_WORKERS__MODE": "none"}) as fleet:
        device = fleet.device()
        poll = threading.Thread(target=lambda: answers.append(device.poll(small, wait_ms=25_000)))
        poll.start()
        while not len(fleet.cloud._board):
            time.sleep(0.01)
        fleet._run(fleet.cloud.close())
        poll.join(15)
        fleet.cloud.close = _nothing  # type: ignore[method-assign]
    assert len(answers) == 1 and not answers[0].HasField("release")


async def _nothing() -> None:
    return


def test_shift_is_undone(small: Bundle) -> None:
    from fleet_of import cleared

    assert np.abs(cleared(shifted(pictures(4))).astype(int) - pictures(4)).max() <= 3
