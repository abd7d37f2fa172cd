"""One test for each attack on the service, named for it."""

from __future__ import annotations

import hashlib
import io
import zlib
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from fleet_of import COHORT, Fleet, key_pem, pictures, request_pem, sample, statistics
from PIL import Image

from cloud.identity import Authority
from refold.bundle import Bundle
from refold.limits import LIMITS
from refold.v1 import adaptation_pb2, admin_pb2, fleet_pb2
from refold.v1 import samples_pb2 as pb


def refused(call: Any, *args: Any) -> tuple[grpc.StatusCode, str, str]:
    """(status, sentence, stable code) of a call that must fail."""
    with pytest.raises(grpc.RpcError) as e:
        call(*args, timeout=20)
    return e.value.code(), e.value.details(), dict(e.value.trailing_metadata() or ()).get("refold-code", "")


def test_device_calls_admin(fleet: Fleet) -> None:
    device = fleet.device()
    for call, request in (
        (device.admin.Status, admin_pb2.StatusRequest()),
        (device.admin.ListReleases, admin_pb2.ListReleasesRequest()),
        (device.admin.Rollback, admin_pb2.RollbackRequest()),
    ):
        status, sentence, code = refused(call, request)
        assert (status, code) == (grpc.StatusCode.PERMISSION_DENIED, "wrong-role")
        assert sentence == f"This call is for operators; {device.id} is a device."


def test_operator_poses_as_device(fleet: Fleet) -> None:
    status, _, _ = refused(fleet.operator().fleet.Heartbeat, fleet_pb2.HeartbeatRequest())
    assert status is grpc.StatusCode.PERMISSION_DENIED


def test_caller_without_certificate_on_the_main_port(fleet: Fleet) -> None:
    nobody = fleet.caller(None, None)
    status, _, _ = refused(nobody.admin.Status, admin_pb2.StatusRequest())
    assert status is grpc.StatusCode.UNAVAILABLE  # the handshake already fails


def test_certificate_of_another_authority(fleet: Fleet) -> None:
    pem, key = Authority.make("forger").issue_operator("operator")
    status, _, _ = refused(fleet.caller(key, pem).admin.Status, admin_pb2.StatusRequest())
    assert status is grpc.StatusCode.UNAVAILABLE


def test_expired_certificate(fleet: Fleet) -> None:
    pem, key = fleet.cloud._authority.issue_operator("operator", days=-0.001)
    status, _, _ = refused(fleet.caller(key, pem).admin.Status, admin_pb2.StatusRequest())
    assert status is grpc.StatusCode.UNAVAILABLE


def test_server_certificate_used_as_a_client(fleet: Fleet) -> None:
    pem, key = fleet.cloud._authority.issue_server(["localhost"])
    with pytest.raises(grpc.RpcError):
        fleet.caller(key, pem).admin.Status(admin_pb2.StatusRequest(), timeout=20)


def test_services_that_are_not_on_the_enrolment_port(fleet: Fleet, small: Bundle) -> None:
    stranger = fleet.stranger()
    assert refused(stranger.admin.Status, admin_pb2.StatusRequest())[0] is grpc.StatusCode.UNIMPLEMENTED
    assert refused(stranger.fleet.Heartbeat, fleet_pb2.HeartbeatRequest())[::2] == (
        grpc.StatusCode.UNAUTHENTICATED, "no-certificate",
    )  # fmt: skip


def test_replayed_join_token(fleet: Fleet) -> None:
    token, first = fleet.token(), ec.generate_private_key(ec.SECP256R1())
    device = fleet.enrol(first, token).device_id
    assert fleet.enrol(first, token).device_id == device  # its own answer was lost: it may ask again
    request = fleet_pb2.EnrollRequest(join_token=token, csr_pem=request_pem(ec.generate_private_key(ec.SECP256R1())))
    status, sentence, code = refused(fleet.stranger().fleet.Enroll, request)
    assert (status, code) == (grpc.StatusCode.PERMISSION_DENIED, "bad-token") and "refold cloud token" in sentence


def test_guessed_and_expired_join_tokens_are_told_the_same(fleet: Fleet) -> None:
    csr = request_pem(ec.generate_private_key(ec.SECP256R1()))
    expired = fleet.token(hours=1e-9)
    answers = {
        refused(fleet.stranger().fleet.Enroll, fleet_pb2.EnrollRequest(join_token=t, csr_pem=csr)) for t in ("x", expired)
    }
    assert len(answers) == 1


def test_join_tokens_are_stored_as_hashes(fleet: Fleet, tmp_path: Path) -> None:
    token = fleet.token()
    stored = b"".join(p.read_bytes() for p in (tmp_path / "fleet").glob("refold.db*"))
    assert token.encode() not in stored and hashlib.sha256(token.encode()).hexdigest().encode() in stored


def test_request_that_asks_for_more_than_a_device(fleet: Fleet) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("refold://role/operator"), x509.DNSName("localhost")])
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "operator")])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).add_extension(names, False)
    csr = csr.add_extension(x509.BasicConstraints(ca=True, path_length=3), True).sign(key, hashes.SHA256())
    request = fleet_pb2.EnrollRequest(join_token=fleet.token(), csr_pem=csr.public_bytes(serialization.Encoding.PEM))
    answer = fleet.stranger().fleet.Enroll(request, timeout=20)
    certificate = x509.load_pem_x509_certificate(answer.certificate_pem)
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [n.value for n in san] == ["refold://role/device"]
    assert (
        refused(fleet.caller(key_pem(key), answer.certificate_pem).admin.Status, admin_pb2.StatusRequest())[2] == "wrong-role"
    )


def test_request_over_somebody_elses_key(fleet: Fleet) -> None:
    victim = request_pem(ec.generate_private_key(ec.SECP256R1()))
    forged = bytearray(victim)
    forged[len(forged) // 2] ^= 1
    token = fleet.token()
    for csr in (bytes(forged), b"", b"-----BEGIN CERTIFICATE REQUEST-----\n", b"x" * 50_000):
        request = fleet_pb2.EnrollRequest(join_token=token, csr_pem=csr)
        assert refused(fleet.stranger().fleet.Enroll, request)[::2] == (grpc.StatusCode.PERMISSION_DENIED, "bad-request")


def test_endless_data_on_the_enrolment_port(fleet: Fleet) -> None:
    request = fleet_pb2.EnrollRequest(join_token="x" * 100_000)
    assert refused(fleet.stranger().fleet.Enroll, request)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_rsa_and_other_curves(fleet: Fleet) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa

    for key in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())):
        request = fleet_pb2.EnrollRequest(join_token=fleet.token(), csr_pem=request_pem(key))  # type: ignore[arg-type]
        assert refused(fleet.stranger().fleet.Enroll, request)[2] == "bad-request"


def test_revoked_device_is_shut_out_at_once_and_cannot_come_back_with_its_key(fleet: Fleet, small: Bundle) -> None:
    device = fleet.device()
    assert device.upload(sample(small, pictures(1)[0])).stored
    assert fleet.store.revoke(device.id)
    for call, request in (
        (device.fleet.Heartbeat, fleet_pb2.HeartbeatRequest()),
        (device.adaptation.PollRelease, adaptation_pb2.PollReleaseRequest()),
        (device.fleet.Enroll, fleet_pb2.EnrollRequest(csr_pem=request_pem(device.key))),
    ):
        assert refused(call, request)[::2] == (grpc.StatusCode.PERMISSION_DENIED, "revoked")
    again = fleet_pb2.EnrollRequest(join_token=fleet.token(), csr_pem=request_pem(device.key))
    assert refused(fleet.stranger().fleet.Enroll, again)[2] == "revoked"


def test_certificate_of_a_device_that_never_enrolled(fleet: Fleet) -> None:
    from cloud.identity import read_request

    key = ec.generate_private_key(ec.SECP256R1())
    pem, _, _ = fleet.cloud._authority.issue_device(read_request(request_pem(key)), "ghost", 1)
    assert refused(fleet.caller(key_pem(key), pem).fleet.Heartbeat, fleet_pb2.HeartbeatRequest())[2] == "unknown-device"


def test_device_takes_another_devices_name(fleet: Fleet) -> None:
    first, second = fleet.device("Gate 7"), fleet.device("Gate 7")
    assert first.id != second.id and first.id.startswith("gate-7-")
    nasty = fleet.device("../../etc/passwd\x00\n OU=operator")
    assert set(nasty.id) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_renewal_keeps_the_devices_name_whatever_it_asks_for(fleet: Fleet) -> None:
    device, key = fleet.device(), ec.generate_private_key(ec.SECP256R1())
    request = fleet_pb2.EnrollRequest(csr_pem=request_pem(key, "operator"), cohort="other")
    answer = device.fleet.Enroll(request, timeout=20)
    assert (answer.device_id, answer.cohort) == (device.id, COHORT)
    renewed = fleet.caller(key_pem(key), answer.certificate_pem)
    renewed.fleet.Heartbeat(fleet_pb2.HeartbeatRequest(), timeout=20)


def test_device_polls_for_another_cohort(fleet: Fleet, small: Bundle) -> None:
    device = fleet.device()
    request = adaptation_pb2.PollReleaseRequest(bundle_digest=small.digest, cohort="cellar")
    assert refused(device.adaptation.PollRelease, request)[::2] == (grpc.StatusCode.PERMISSION_DENIED, "wrong-cohort")


def codes(answer: adaptation_pb2.UploadSamplesResponse) -> list[str]:
    assert not answer.stored
    return [r.code for r in answer.refused]


def test_payload_under_another_digest(fleet: Fleet, small: Bundle) -> None:
    one, two = (sample(small, p) for p in pictures(2))
    two.header.digest = one.header.digest
    device = fleet.device()
    assert codes(device.upload(two)) == ["digest"]
    assert device.upload(one).stored


def test_digest_that_is_a_path(fleet: Fleet, small: Bundle, tmp_path: Path) -> None:
    device, one = fleet.device(), sample(small, pictures(1)[0])
    before = sorted(p for p in tmp_path.rglob("*") if "refold.db" not in p.name)
    for digest in ("../../../../tmp/x", "/etc/passwd", "", "A" * 64, "0" * 63, "0" * 64 + "\n", "é" * 64):
        one.header.digest = digest
        assert codes(device.upload(one)) == ["digest"]
        assert list(device.offer(one).unwanted) == [digest]
    assert sorted(p for p in tmp_path.rglob("*") if "refold.db" not in p.name) == before


def test_oversized_sample(fleet: Fleet, small: Bundle) -> None:
    device = fleet.device()
    big = sample(small, pictures(1)[0], raw=True)
    big.payload = bytes(LIMITS.sample_bytes + 1)
    big.header.size, big.header.digest = len(big.payload), hashlib.sha256(big.payload).hexdigest()
    assert codes(device.upload(big)) == ["sample-too-large"]
    assert list(device.offer(big).unwanted) == [big.header.digest]


def test_too_many_samples_in_one_call(fleet: Fleet, small: Bundle) -> None:
    device = fleet.device()
    many = [sample(small, p, raw=True) for p in pictures(LIMITS.samples_per_call + 1)]
    request = adaptation_pb2.UploadSamplesRequest(samples=many)
    assert refused(device.adaptation.UploadSamples, request)[::2] == (grpc.StatusCode.INVALID_ARGUMENT, "too-many")


def test_decompression_bomb(fleet: Fleet, small: Bundle) -> None:
    device = fleet.device()
    out = io.BytesIO()
    Image.new("RGB", (16_000, 8_000)).save(out, "WEBP", lossless=True)
    payload = out.getvalue()
    bomb = pb.Sample(payload=payload, header=sample(small, pictures(1)[0]).header)
    bomb.header.digest, bomb.header.size = hashlib.sha256(payload).hexdigest(), len(payload)
    assert codes(device.upload(bomb)) == ["unreadable"]
    bomb.header.width, bomb.header.height = 16_000, 8_000
    assert codes(device.upload(bomb)) == ["wrong-size"]


def test_payloads_that_are_no_picture(fleet: Fleet, small: Bundle) -> None:
    device = fleet.device()
    gif = io.BytesIO()
    Image.new("RGB", (16, 16)).save(gif, "GIF")
    frames = io.BytesIO()
    stills = [Image.new("RGB", (16, 16), c) for c in ("red", "blue")]
    stills[0].save(frames, "WEBP", lossless=True, save_all=True, append_images=stills[1:])
    good = sample(small, pictures(1)[0]).payload
    for payload in (b"RIFF....WEBP", zlib.compress(b"x"), gif.getvalue(), frames.getvalue(), good[:-40], b"\x80\x04pickle"):
        one = pb.Sample(payload=payload, header=sample(small, pictures(1)[0]).header)
        one.header.digest, one.header.size = hashlib.sha256(payload).hexdigest(), len(payload)
        assert codes(device.upload(one)) == ["unreadable"]
    odd = sample(small, pictures(1)[0], codec=77)
    assert codes(device.upload(odd)) == ["codec"]


def test_sample_of_another_model(fleet: Fleet, small: Bundle) -> None:
    device, image = fleet.device(), pictures(1)[0]
    unknown = sample(small, image, bundle_digest="f" * 64)
    other = sample(small, image, preprocess_digest="f" * 64)
    large = sample(small, pictures(1)[0].repeat(2, 0).repeat(2, 1))
    assert [codes(device.upload(s)) for s in (unknown, other, large)] == [["unknown-bundle"], ["preprocess"], ["wrong-size"]]
    assert len(device.offer(unknown, other, large).unwanted) == 3


def test_one_bad_sample_does_not_spoil_its_batch(fleet: Fleet, small: Bundle) -> None:
    good, bad = (sample(small, p) for p in pictures(2))
    bad.payload = b"x" + bad.payload[1:]
    answer = fleet.device().upload(good, bad)
    assert list(answer.stored) == [good.header.digest] and answer.refused[0].code == "digest"


def test_poisoned_statistics(fleet: Fleet, small: Bundle) -> None:
    device = fleet.device()
    site = small.norms.norms[0]
    zeros = {site.name: [0.0] * site.channels}
    for report, code in (
        (statistics(small, zeros, {site.name: [float("nan")] * site.channels}), "not-finite"),
        (statistics(small, zeros, {site.name: [-1.0] * site.channels}), "not-finite"),
        (statistics(small, zeros, {site.name: [1.0]}), "report"),
        (statistics(small, zeros, {site.name: [1.0] * site.channels}, frames=2**60), "report"),
        (statistics(small, {}, {}), "report"),
        (statistics(small, zeros, {site.name: [1.0] * site.channels}, bundle_digest="0" * 64), "unknown-bundle"),
    ):
        request = adaptation_pb2.UploadStatisticsRequest(report=report)
        assert refused(device.adaptation.UploadStatistics, request)[::2] == (grpc.StatusCode.INVALID_ARGUMENT, code)


def test_flood_of_calls_and_bytes(tmp_path: Path, small: Bundle) -> None:
    from cloud.bundles import register

    limits = {"CALLS_PER_MINUTE": "8", "BYTES_PER_HOUR": "2000", "RETRY_MS": "5000"}
    environment = {"REFOLD_CLOUD_WORKERS__MODE": "none", **{f"REFOLD_CLOUD_QUOTA__{k}": v for k, v in limits.items()}}
    with Fleet(tmp_path / "fleet", environment) as fleet:
        register(fleet.store, fleet.cloud._objects, small.path, [])
        device, other = fleet.device("a"), fleet.device("b")
        pairs = [sample(small, p, raw=True) for p in pictures(6)]  # 768 bytes each
        offer = device.offer(*pairs)
        assert len(offer.wanted) == 3 and not offer.unwanted and 0 < offer.retry_after_ms <= 5000
        assert len(device.upload(*pairs[:3]).stored) == 3
        assert refused(device.adaptation.UploadSamples, adaptation_pb2.UploadSamplesRequest(samples=pairs[3:]))[2] == "quota"
        assert other.upload(*pairs[3:]).stored  # another device's share is its own
        with pytest.raises(grpc.RpcError) as e:
            for _ in range(9):
                device.fleet.Heartbeat(fleet_pb2.HeartbeatRequest(), timeout=20)
        assert e.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(e.value.trailing_metadata())["refold-retry-ms"]) > 0


def test_full_disk_refuses_uploads_and_keeps_answering(fleet: Fleet, small: Bundle) -> None:
    device = fleet.device()
    fleet.cloud._objects._free = 2**62
    request = adaptation_pb2.UploadSamplesRequest(samples=[sample(small, pictures(1)[0])])
    status, sentence, code = refused(device.adaptation.UploadSamples, request)
    assert (status, code) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "disk-full") and "bytes free" in sentence
    device.fleet.Heartbeat(fleet_pb2.HeartbeatRequest(), timeout=20)


def test_unexpected_failure_tells_an_incident_and_nothing_else(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    device = fleet.device()
    monkeypatch.setattr(fleet.cloud._store.__class__, "saw_device", lambda *a, **k: broken())
    status, sentence, code = refused(device.fleet.Heartbeat, fleet_pb2.HeartbeatRequest())
    assert (status, code) == (grpc.StatusCode.INTERNAL, "internal") and "secret" not in sentence
    incident = sentence.rstrip(".").split()[-1]
    assert any(incident in r.getMessage() and r.exc_info for r in caplog.records)
