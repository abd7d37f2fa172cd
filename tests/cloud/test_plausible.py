"""What a device may claim: frames, moments, scores and names, over the real service and at the edges of every number."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from databases import fresh_database
from fleet_of import COHORT, Fleet, key_pem, pictures, request_pem, sample, statistics
from hypothesis import given
from hypothesis import strategies as st
from test_cloud_attacks import refused

from cloud.bundles import register
from cloud.enrol import device_id, key_digest, make_token
from cloud.fleet.plausible import check_header, check_report, frames_possible, printable
from cloud.identity import read_request
from cloud.settings import QuotaSettings
from cloud.show import show_status
from cloud.store import DeviceRecord, StatisticsRecord, Store
from refold.bundle import Bundle
from refold.errors import AccessError, InputError, UsageError
from refold.v1 import adaptation_pb2, admin_pb2, fleet_pb2
from refold.v1 import samples_pb2 as pb

QUOTA = QuotaSettings()


def report_of(small: Bundle, **values: Any) -> pb.StatisticsReport:
    site = small.norms.norms[0]
    return statistics(small, {site.name: [0.0] * site.channels}, {site.name: [1.0] * site.channels}, **values)


def send(device: Any, report: pb.StatisticsReport) -> None:
    device.adaptation.UploadStatistics(adaptation_pb2.UploadStatisticsRequest(report=report), timeout=20)


def test_a_device_claims_ten_million_frames(fleet: Fleet, small: Bundle) -> None:
    device = fleet.device()
    for frames in (10_000_000, QUOTA.report_frames + 1, 0, 2**63, 2**64 - 1):
        request = adaptation_pb2.UploadStatisticsRequest(report=report_of(small, frames=frames))
        status, message, code = refused(device.adaptation.UploadStatistics, request)
        assert (status, code) == (grpc.StatusCode.INVALID_ARGUMENT, "report") and "quota.report_frames" in message
    assert fleet.store.statistics_after(small.digest, COHORT, 0, 9) == []


def test_a_device_claims_more_frames_than_have_passed(fleet: Fleet, small: Bundle) -> None:
    """In many reports, each of which could be: their sum cannot, one second after it enrolled."""
    device, stored = fleet.device(), 0
    for n in range(10):
        request = adaptation_pb2.UploadStatisticsRequest(
            report=report_of(small, frames=4000, last_frame=4000 + n, first_frame=n)
        )
        try:
            device.adaptation.UploadStatistics(request, timeout=20)
            device.adaptation.UploadStatistics(request, timeout=20)  # a repeat claims nothing more
            stored += 1
        except grpc.RpcError:
            status, message, code = refused(device.adaptation.UploadStatistics, request)
            assert (status, code) == (grpc.StatusCode.INVALID_ARGUMENT, "implausible")
            assert "quota.frames_per_second" in message
    record = fleet.store.device(device.id)
    assert record is not None and record.frames == 4000 * stored
    seconds = (time.time() * 1000 - record.enrolled_ms) / 1000
    assert 2 <= stored <= (QUOTA.frames_ahead + seconds * QUOTA.frames_per_second) / 4000
    assert len(fleet.store.statistics_after(small.digest, COHORT, 0, 99)) == stored
    other = fleet.device("Gate 8")
    send(other, report_of(small, frames=4000, last_frame=9999))  # others are not held to account for it


def test_frames_are_counted_across_restarts_and_beyond_retention(database_url: str) -> None:
    store = Store(database_url)
    store.put_device("device", COHORT, "01", 5)

    def report(n: int, frames: int) -> StatisticsRecord:
        return StatisticsRecord(f"{n:064x}", "b" * 64, COHORT, "device", "d1", 0, frames, b"p", 5)

    assert store.add_statistics(report(1, 60), 100) and not store.add_statistics(report(1, 60), 100)
    store.forget(before_ms=2**60, samples_per_cohort=100, statistics_per_cohort=100)
    store.close()
    store = Store(database_url)
    with pytest.raises(InputError, match="more than the 100"):
        store.add_statistics(report(2, 41), 100)
    assert store.statistics_after("b" * 64, COHORT, 0, 9) == [] and store.device("device").frames == 60  # type: ignore[union-attr]
    assert store.add_statistics(report(2, 41), 101)
    store.close()


@given(st.integers(0, 2**62), st.integers(0, 2**62), st.floats(1e-3, 1e9), st.integers(0, 2**62))
def test_frames_grow_with_time_and_fit_the_database(enrolled: int, now: int, fps: float, ahead: int) -> None:
    quota = QuotaSettings(frames_per_second=fps, frames_ahead=ahead)
    found = frames_possible(enrolled, now, quota)
    assert ahead <= found < 2**63 and found <= frames_possible(enrolled, now + 1000, quota)
    if now <= enrolled:  # a clock that was set back
        assert found == ahead


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"first_frame": 10, "last_frame": 9}, "report"),
        ({"first_frame": 1, "last_frame": 63}, "report"),  # 63 frames cannot hold 64
        ({"first_frame": 2**64 - 1, "last_frame": 0}, "report"),
        ({"release_version": 2**63}, "report"),
        ({"domain": "d" * 33}, "domain"),
        ({"domain": "d\0"}, "domain"),
        ({"domain": "d\x1b[31m"}, "domain"),
        ({"bundle_digest": "\0" * 64}, "unknown-bundle"),
        ({"bundle_digest": ""}, "unknown-bundle"),
    ],
)
def test_reports_whose_numbers_contradict_each_other(fleet: Fleet, small: Bundle, change: dict[str, Any], code: str) -> None:
    request = adaptation_pb2.UploadStatisticsRequest(report=report_of(small, **change))
    assert refused(fleet.device().adaptation.UploadStatistics, request)[::2] == (grpc.StatusCode.INVALID_ARGUMENT, code)


def test_reports_that_can_be(fleet: Fleet, small: Bundle) -> None:
    device = fleet.device()
    for n, change in enumerate(
        ({}, {"first_frame": 1, "last_frame": 64}, {"last_frame": 2**64 - 1}, {"release_version": 2**62})
    ):
        send(device, report_of(small, domain=f"d{n}", **change))
    assert len(fleet.store.statistics_after(small.digest, COHORT, 0, 9)) == 4


BAD = [math.nan, math.inf, -math.inf, 3.3e38, -1e16]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["mean", "variance"])
def test_moments_that_no_network_has(small: Bundle, value: float, where: str) -> None:
    report = report_of(small)
    getattr(report.sites[0], where)[0] = value
    with pytest.raises(InputError) as e:
        check_report(report, QUOTA)
    assert e.value.code in ("not-finite", "implausible")


def test_a_site_told_twice_or_under_a_strange_name(small: Bundle) -> None:
    twice = report_of(small)
    twice.sites.add().CopyFrom(twice.sites[0])
    strange = report_of(small)
    strange.sites[0].site = "conv\0"
    empty = report_of(small)
    del empty.sites[0].mean[:]
    for report in (twice, strange, empty):
        with pytest.raises(InputError) as e:
            check_report(report, QUOTA)
        assert e.value.code == "report"


@given(st.floats(width=32), st.floats(width=32))
def test_every_accepted_moment_has_a_finite_square(mean: float, variance: float) -> None:
    import numpy as np

    report = pb.StatisticsReport(frames=1, sites=[pb.SiteStatistics(site="s", mean=[mean], variance=[variance])])
    try:
        check_report(report, QUOTA)
    except InputError:
        return
    assert np.isfinite(np.float32(variance) + np.float32(mean) ** 2) and variance >= 0


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ({"score": math.nan}, "not-finite"),
        ({"score": math.inf}, "not-finite"),
        ({"entropy": math.nan}, "not-finite"),
        ({"entropy": -1.0}, "implausible"),
        ({"entropy": 23.0}, "implausible"),
        ({"size": 2**64 - 1}, "sample-too-large"),
        ({"width": 2**32 - 1}, "wrong-size"),
        ({"digest": "\0" * 64}, "digest"),
        ({"bundle_digest": "\0" * 64}, "unknown-bundle"),
    ],
)
def test_headers_that_cannot_be(fleet: Fleet, small: Bundle, header: dict[str, Any], code: str) -> None:
    device, (good, bad) = fleet.device(), [sample(small, p) for p in pictures(2)]
    wrong = sample(small, pictures(2)[1], **header)
    assert [r.code for r in device.upload(wrong).refused] == [code]
    offer = device.offer(wrong, good)
    assert list(offer.wanted) == [good.header.digest] and list(offer.unwanted) == [wrong.header.digest]
    for n in (0.0, -1e-6, 22.1):
        bad.header.entropy = n
        check_header(bad.header)


def test_a_heartbeat_of_nonsense_is_recorded_and_shown(
    tmp_path: Path, small: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trimmed, not refused: a sick device is heard. Its words are words to a terminal, to rich and to PostgreSQL."""
    with Fleet(tmp_path / "fleet", {"REFOLD_CLOUD_WORKERS__MODE": "none"}) as fleet:
        heartbeat_of_nonsense(fleet)
        capsys.readouterr()
        show_status(fleet.operator().admin.Status(admin_pb2.StatusRequest(), timeout=20))
        shown = capsys.readouterr().out
        assert "[/red]" in shown and ":smile:" in shown and "\x1b[31m" not in shown


def heartbeat_of_nonsense(fleet: Fleet) -> None:
    device = fleet.device()
    request = fleet_pb2.HeartbeatRequest(
        bundle_digest="\0" * 70, release_version=2**64 - 1, state="\0" * 99, domain="d\n" * 99,
        last_error="[/red] :smile:\0\x1b[31m", metrics={"a\0": 1.0, "b": math.nan, "c": math.inf, "d" * 99: -1e308},
    )  # fmt: skip
    assert device.fleet.Heartbeat(request, timeout=20).latest_release_version == 0
    record = fleet.store.device(device.id)
    assert record is not None and record.metrics == {"a ": 1.0, "d" * 64: -1e308}
    assert record.last_error == "[/red] :smile:  [31m" and len(record.domain) == 64 and record.release_version == 2**62


@pytest.fixture
def on_postgres(tmp_path: Path, small: Bundle) -> Iterator[Fleet]:
    """A running service whose rows are in PostgreSQL."""
    with fresh_database("postgresql", tmp_path) as url:
        settings = {"REFOLD_CLOUD_WORKERS__MODE": "none", "REFOLD_CLOUD_STORAGE__DATABASE": url}
        with Fleet(tmp_path / "fleet", settings) as running:
            register(running.store, running.cloud._objects, small.path, [])
            yield running


def test_a_whole_service_on_postgresql(on_postgres: Fleet, small: Bundle) -> None:
    device, samples = on_postgres.device(), [sample(small, p) for p in pictures(4)]
    assert list(device.offer(*samples).wanted) == [s.header.digest for s in samples]
    assert len(device.upload(*samples).stored) == 4 and len(device.upload(*samples).stored) == 4
    send(device, report_of(small))
    heartbeat_of_nonsense(on_postgres)
    assert not device.poll(small).use_exported
    status = on_postgres.operator().admin.Status(admin_pb2.StatusRequest(), timeout=20)
    assert [(c.cohort, c.samples, c.statistics_reports) for c in status.cohorts] == [(COHORT, 4, 1)] and len(
        status.devices
    ) == 2
    poll = adaptation_pb2.PollReleaseRequest(bundle_digest="\0")
    assert refused(device.adaptation.PollRelease, poll)[::2] == (grpc.StatusCode.INVALID_ARGUMENT, "bad-value")


@given(st.text("aé7 \0\n\x1b\u202e\u200b", max_size=80), st.integers(0, 64))
def test_printable_text_is_short_and_printable(text: str, length: int) -> None:
    found = printable(text, length)
    assert len(found) == min(length, len(text)) and found.isprintable() and printable(found, length) == found


def test_statistics_count_as_bytes(tmp_path: Path, small: Bundle) -> None:
    environment = {"REFOLD_CLOUD_WORKERS__MODE": "none", "REFOLD_CLOUD_QUOTA__BYTES_PER_HOUR": "300"}
    with Fleet(tmp_path / "fleet", environment) as fleet:
        register(fleet.store, fleet.cloud._objects, small.path, [])
        device = fleet.device()
        report = report_of(small)
        send(device, report)
        for _ in range(9):
            try:
                send(device, report)
            except grpc.RpcError as e:
                assert e.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                return
    raise AssertionError("a device may send statistics without end")


# Names ----------------------------------------------------------------------------------------------------


def test_an_id_has_128_bits_of_its_key_and_fits_a_certificate(fleet: Fleet) -> None:
    for name in ("Gate 7", "x" * 64, "ÄÖÜ", "-" * 40, "a" * 30 + "-b"):
        key = ec.generate_private_key(ec.SECP256R1())
        answer = fleet.enrol(key, fleet.token(), name)
        der = read_request(request_pem(key, name))
        assert answer.device_id.endswith("-" + key_digest(der)[:32]) and len(answer.device_id) <= 64
        caller = fleet.caller(key_pem(key), answer.certificate_pem)
        caller.fleet.Heartbeat(fleet_pb2.HeartbeatRequest(), timeout=20)
        record = fleet.store.device(answer.device_id)
        assert record is not None and record.key_digest == key_digest(der)


def test_an_id_that_another_key_has_is_refused_before_the_token_is_spent(fleet: Fleet) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = device_id(read_request(request_pem(key)))
    fleet.store.put_device(name, COHORT, "01", 2**40, "f" * 64)  # as if 128 bits agreed
    token = fleet.token()
    request = fleet_pb2.EnrollRequest(join_token=token, csr_pem=request_pem(key))
    assert refused(fleet.stranger().fleet.Enroll, request)[2] == "id-taken"
    assert fleet.enrol(ec.generate_private_key(ec.SECP256R1()), token).device_id  # the token is as good as before


def former(fleet: Fleet, key: ec.EllipticCurvePrivateKey) -> tuple[str, bytes]:
    """A device as it was enrolled before 2026-11-29: its id, of 48 bits, and its certificate."""
    csr = read_request(request_pem(key))
    name = f"gate-7-{key_digest(csr)[:12]}"
    pem, peer, expires = fleet.cloud._authority.issue_device(csr, name, 90)
    fleet.store.put_device(name, COHORT, peer.serial, expires)
    return name, pem


def test_devices_from_before_keep_their_ids_and_renew(fleet: Fleet, small: Bundle) -> None:
    key, fresh = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    name, pem = former(fleet, key)
    device = fleet.caller(key_pem(key), pem)
    assert device.upload(sample(small, pictures(1)[0])).stored
    answer = device.fleet.Enroll(fleet_pb2.EnrollRequest(csr_pem=request_pem(fresh)), timeout=20)
    assert answer.device_id == name
    fleet.caller(key_pem(fresh), answer.certificate_pem).fleet.Heartbeat(fleet_pb2.HeartbeatRequest(), timeout=20)
    assert fleet.enrol(key, fleet.token()).device_id != name  # 48 bits do not prove that it is the same key


def test_a_revoked_key_stays_out_under_every_name(fleet: Fleet) -> None:
    old, new = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    fleet.store.revoke(former(fleet, old)[0])
    fleet.store.revoke(fleet.enrol(new, fleet.token()).device_id)
    for key in (old, new):
        for name in ("Gate 7", "Another"):
            request = fleet_pb2.EnrollRequest(join_token=fleet.token(), csr_pem=request_pem(key, name))
            assert refused(fleet.stranger().fleet.Enroll, request)[2] == "revoked"


def test_the_store_knows_keys_apart(database_url: str) -> None:
    store = Store(database_url)
    key = hashlib.sha256(b"key").hexdigest()
    store.put_device("a", COHORT, "01", 5, key)
    store.put_device("a", COHORT, "02", 6, key)
    store.put_device("a", COHORT, "03", 7)
    assert store.device("a") == DeviceRecord("a", COHORT, "03", 7, store.device("a").enrolled_ms, key_digest=key)  # type: ignore[union-attr]
    store.check_key("a", key)
    with pytest.raises(AccessError):
        store.put_device("a", COHORT, "04", 8, "f" * 64)
    with pytest.raises(AccessError):
        store.check_key("a", "f" * 64)
    store.put_device(f"b-{key[:12]}", COHORT, "05", 9)
    store.check_key("b", key)
    store.revoke(f"b-{key[:12]}")
    with pytest.raises(AccessError, match="was revoked"):
        store.check_key("b", key)
    store.close()


@pytest.mark.parametrize("hours", [0.0, -1.0, math.nan, math.inf, 1e300])
@pytest.mark.parametrize("uses", [1, 0, 2**31])
def test_tokens_that_last_for_ever_or_admit_everybody(tmp_path: Path, hours: float, uses: int) -> None:
    store = Store(f"sqlite:///{tmp_path / 'refold.db'}")
    with pytest.raises(UsageError):
        make_token(store, "roof", hours, uses)
    store.close()
