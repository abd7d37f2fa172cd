"""Enrolment against a real TLS server: what a token buys, who sees it, and what a lost answer or a crash leaves behind."""

from __future__ import annotations

import hashlib
import json
import stat
import time
from dataclasses import replace

import grpc
import pytest
from cloud_double import RELEASE_KEY, Authority, Cloud, fail
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edge.enrol import Identity, enrol, renew
from edge.link_settings import EnrolSettings, LinkSettings
from refold.errors import AccessError, NetworkError, StorageError, UsageError
from refold.v1 import fleet_pb2

AUTHORITY = Authority()


@pytest.fixture
def cloud():
    c = Cloud(AUTHORITY, mutual=False)
    c.start()
    yield c
    c.stop()


@pytest.fixture
def settings(cloud, tmp_path):
    ca = tmp_path / "ca.pem"
    ca.write_bytes(AUTHORITY.pem)
    return EnrolSettings(address=cloud.address, ca=ca, cohort="wished", name="roof camera")


def test_a_token_buys_an_identity_that_is_kept(cloud, settings, tmp_path):
    identity = enrol(settings, "good", tmp_path / "id")
    assert identity == Identity.load(tmp_path / "id")
    assert identity.device_id == "dev-1" and identity.cohort == "roof" and identity.release_keys == (RELEASE_KEY.public,)
    certificate = x509.load_pem_x509_certificate(identity.certificate_pem)
    key = serialization.load_pem_private_key(identity.key_pem, None)
    assert certificate.public_key() == key.public_key() and isinstance(key.curve, ec.SECP256R1)
    assert cloud.enrolments[0].cohort == "wished"
    assert x509.load_pem_x509_csr(cloud.enrolments[0].csr_pem).subject.rfc4514_string() == "CN=roof camera"


def test_the_private_key_stays_here_and_is_the_owners_alone(cloud, settings, tmp_path):
    identity = enrol(settings, "good", tmp_path / "id")
    assert stat.S_IMODE((tmp_path / "id" / "identity.json").stat().st_mode) == 0o600
    assert b"PRIVATE" not in cloud.enrolments[0].SerializeToString() and "PRIVATE" not in repr(identity)
    assert [p.name for p in (tmp_path / "id").iterdir()] == ["identity.json"]


@pytest.mark.parametrize("token", ["used", "bad"])
def test_a_used_or_unknown_token_is_refused_in_the_clouds_words(settings, tmp_path, token):
    with pytest.raises(AccessError, match="used up") as e:
        enrol(settings, token, tmp_path / "id")
    assert e.value.code == "bad-token" and not (tmp_path / "id" / "identity.json").exists()


def test_a_lost_answer_is_asked_for_again_with_the_same_request(cloud, settings, tmp_path):
    cloud.after["Enroll"] = [fail(grpc.StatusCode.UNAVAILABLE)]
    with pytest.raises(NetworkError):
        enrol(settings, "good", tmp_path / "id")
    assert stat.S_IMODE((tmp_path / "id" / "pending.json").stat().st_mode) == 0o600
    enrol(settings, "good", tmp_path / "id")
    assert cloud.enrolments[0] == cloud.enrolments[1] and not (tmp_path / "id" / "pending.json").exists()


def test_enrolling_again_replaces_the_identity_and_its_key(cloud, settings, tmp_path):
    first = enrol(settings, "good", tmp_path / "id")
    second = enrol(settings, "good", tmp_path / "id")
    assert first.key_pem != second.key_pem and Identity.load(tmp_path / "id") == second


def test_the_token_is_not_sent_to_a_server_of_another_authority(cloud, settings, tmp_path):
    settings.ca.write_bytes(Authority("stranger").pem)
    with pytest.raises(NetworkError, match="do not accept each other"):
        enrol(settings, "good", tmp_path / "id")
    assert not cloud.enrolments


def fingerprint(pem):
    return hashlib.sha256(x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)).hexdigest()


def test_a_fingerprint_of_the_servers_certificate_will_do(cloud, settings, tmp_path):
    own = fingerprint(cloud.pair[1])
    colons = ":".join(own[i : i + 2].upper() for i in range(0, 64, 2))
    for text in (own, colons):
        assert enrol(settings.model_copy(update={"ca": None, "fingerprint": text}), "good", tmp_path / "id").cohort == "roof"


def test_the_token_is_not_sent_to_a_server_with_another_fingerprint(cloud, settings, tmp_path):
    with pytest.raises(AccessError, match="not sent") as e:
        enrol(settings.model_copy(update={"ca": None, "fingerprint": "0" * 64}), "good", tmp_path / "id")
    assert e.value.code == "wrong-server" and not cloud.enrolments


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"address": ""}, "needs the address"),
        ({"ca": None}, "CA file"),
        ({"ca": None, "fingerprint": "abc"}, "64 hex digits"),
    ],
)
def test_missing_settings_are_explained(settings, tmp_path, change, says):
    with pytest.raises(UsageError, match=says):
        enrol(settings.model_copy(update=change), "good", tmp_path / "id")


def test_an_unreadable_or_wrong_ca_file_is_explained(settings, tmp_path):
    settings.ca.write_bytes(b"nonsense")
    with pytest.raises(UsageError, match="not a PEM certificate"):
        enrol(settings, "good", tmp_path / "id")
    settings.ca.unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        enrol(settings, "good", tmp_path / "id")


def test_a_cloud_that_is_not_there_is_explained(settings, tmp_path):
    for change in ({"address": "127.0.0.1:1"}, {"address": "127.0.0.1:1", "ca": None, "fingerprint": "0" * 64}):
        with pytest.raises(NetworkError, match="cannot be reached"):
            enrol(settings.model_copy(update=change), "good", tmp_path / "id")


def test_a_directory_that_cannot_be_written_costs_no_token(cloud, settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        enrol(settings, "good", tmp_path / "file" / "id")
    assert not cloud.enrolments


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda a: a.ClearField("release_keys"), "no-release-key"),
        (lambda a: a.release_keys.__setitem__(0, b"short"), "damaged"),
        (lambda a: setattr(a, "certificate_pem", b"nonsense"), "damaged"),
        (lambda a: setattr(a, "certificate_pem", AUTHORITY.identity().certificate_pem), "damaged"),
        (lambda a: setattr(a, "ca_pem", b""), "damaged"),
    ],
)
def test_an_answer_that_makes_no_member_is_refused(cloud, settings, tmp_path, change, code):
    real = cloud.Enroll

    def broken(request, context):
        answer = fleet_pb2.EnrollResponse()
        answer.CopyFrom(real(request, context))
        change(answer)
        return answer

    cloud.Enroll = broken
    cloud.stop()
    cloud.start(cloud.port)
    with pytest.raises(AccessError) as e:
        enrol(settings, "good", tmp_path / "id")
    assert e.value.code == code and not (tmp_path / "id" / "identity.json").exists()


def test_a_device_that_is_not_enrolled_says_how_to(tmp_path):
    with pytest.raises(UsageError, match="refold edge enrol") as e:
        Identity.load(tmp_path)
    assert e.value.code == "not-enrolled"


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"device_id": 1}', "half"])
def test_a_damaged_identity_asks_for_enrolment(tmp_path, damage):
    AUTHORITY.identity().save(tmp_path)
    path = tmp_path / "identity.json"
    if damage == "half":
        values = json.loads(path.read_text())
        damage = json.dumps({**values, "certificate": values["certificate"][:100]})
    path.write_text(damage)
    with pytest.raises(UsageError, match="enrol the device again"):
        Identity.load(tmp_path)


def test_renewal_is_due_after_two_thirds_of_a_life():
    identity = AUTHORITY.identity(days=(0.0, 90.0))
    begin, end = identity.life()
    assert not identity.is_due(begin + 0.66 * (end - begin)) and identity.is_due(begin + 0.67 * (end - begin))


def test_renewal_shows_the_old_certificate_and_makes_a_new_key(tmp_path):
    cloud = Cloud(AUTHORITY)
    cloud.start()
    old = AUTHORITY.identity()
    new = renew(old, LinkSettings(address=cloud.address), tmp_path)
    assert new == Identity.load(tmp_path) and new.key_pem != old.key_pem and new.cohort == "roof"
    assert not new.is_due(time.time()) and cloud.enrolments[0].join_token == ""
    with pytest.raises(NetworkError):
        renew(replace(old, ca_pem=Authority("stranger").pem), LinkSettings(address=cloud.address), tmp_path)
    cloud.stop()
    assert Identity.load(tmp_path) == new
