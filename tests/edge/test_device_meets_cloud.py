"""The device's half against the real service: token, renewal, samples, statistics, releases, rollback, revocation."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cloud_double import until

sys.path.append(str(Path(__file__).parents[1] / "cloud"))
from fleet_of import COHORT, Fleet, make_bundle, pictures, statistics

from cloud.bundles import register
from cloud.releases import Outcome as Judged
from cloud.releases import Releases
from edge.budget import ByteBudget
from edge.encode import make_sample
from edge.enrol import Identity, enrol, renew
from edge.link_settings import EnrolSettings, LinkSettings
from edge.outbox import Outbox
from edge.select import Verdict
from edge.updater import Updater
from edge.uplink import Callbacks, Uplink
from refold import Release
from refold.errors import AccessError, GateError
from refold.release import encode
from refold.v1 import admin_pb2, fleet_pb2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("model") / "small.refold")


@pytest.fixture
def fleet(tmp_path, model):
    with Fleet(tmp_path / "cloud", {"REFOLD_CLOUD_WORKERS__MODE": "none"}) as running:
        register(running.store, running.cloud._objects, model.path, [])
        yield running


def enrolled(fleet, folder, token=None) -> Identity:
    settings = EnrolSettings(address=f"localhost:{fleet.cloud.enrol_port}", ca=fleet.directory / "ca.pem", name="Roof camera")
    return enrol(settings, token or fleet.token(), folder)


def publish(fleet, model, step, domain="d1"):
    states = {
        s.name: s.exported.with_statistics(s.exported.mean + np.float32(0.01 * step), s.exported.variance)
        for s in model.norms.norms
        if s.kind.has_statistics
    }
    payload = encode(Release(model.digest, COHORT, 1, states, domain=domain))
    publisher = Releases(fleet.store, fleet.cloud._key, fleet.cloud._board.notify)
    return publisher.publish(Judged(payload, True, "a test", 0, 0))


class Device:
    def __init__(self, fleet, model, folder):
        self.identity = enrolled(fleet, folder / "id")
        self.running, self.refuses = 0, set()
        self.outbox = Outbox(folder / "outbox.sqlite")
        self.updater = Updater(folder / "updates", model, self.identity.ring, self.apply, cohort=self.identity.cohort)
        self.updater.start()
        settings = LinkSettings(
            address=f"localhost:{fleet.cloud.port}", heartbeat_s=0.2, retry_first_s=0.05, retry_most_s=0.5, linger_s=0.02
        )
        callbacks = Callbacks(
            lambda: self.updater.version, self.updater.follow, lambda: fleet_pb2.HeartbeatRequest(state="running", domain="d1")
        )
        self.uplink = Uplink(
            settings, self.identity, self.outbox, ByteBudget(None, self.outbox), callbacks, bundle_digest=model.digest
        )
        self.uplink.start()

    def apply(self, release):
        version = release.version if release else 0
        if version in self.refuses:
            raise GateError("The canary's answers changed.")
        self.running = version

    def close(self):
        assert self.uplink.close(5.0)
        self.updater.close()
        self.outbox.close()


@pytest.fixture
def device(fleet, model, tmp_path):
    d = Device(fleet, model, tmp_path / "device")
    yield d
    d.close()


def test_a_device_joins_renews_and_is_put_out(fleet, tmp_path):
    token = fleet.token()
    identity = enrolled(fleet, tmp_path / "id", token)
    assert identity.cohort == COHORT and identity.device_id.startswith("roof-camera-") and len(identity.ring) == 1
    with pytest.raises(AccessError):
        enrolled(fleet, tmp_path / "other", token)
    link = LinkSettings(address=f"localhost:{fleet.cloud.port}")
    renewed = renew(identity, link, tmp_path / "id")
    assert renewed.device_id == identity.device_id and renewed.key_pem != identity.key_pem and not renewed.is_due(time.time())
    fleet.store.revoke(identity.device_id)
    with pytest.raises(AccessError) as e:
        renew(renewed, link, tmp_path / "id")
    assert e.value.code == "revoked"


def test_a_fingerprint_is_enough_to_join(fleet, tmp_path):
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    own = x509.load_pem_x509_certificate((fleet.directory / "server.pem").read_bytes()).public_bytes(Encoding.DER)
    settings = EnrolSettings(address=f"localhost:{fleet.cloud.enrol_port}", fingerprint=hashlib.sha256(own).hexdigest())
    assert enrol(settings, fleet.token(), tmp_path / "id").cohort == COHORT


def test_samples_and_statistics_are_stored_once(fleet, model, device):
    for i, image in enumerate(pictures(12)):
        device.outbox.put(*make_sample(
            image, Verdict(True, i / 12, 1.0, "kept"), predicted=1, frame=i, bundle_digest=model.digest,
            preprocess_digest=model.preprocess.digest, release_version=0, domain="d1", taken_unix_ms=1,
        ))  # fmt: skip
    site = next(s for s in model.norms.norms if s.kind.has_statistics)
    device.outbox.put_report(statistics(model, {site.name: site.exported.mean}, {site.name: site.exported.variance}))
    until(lambda: len(device.outbox) == 0 and not device.outbox.reports())
    counts = device.uplink.metrics()
    assert counts["samples_uploaded"] == 12 and counts["samples_refused"] == 0 == counts["statistics_refused"]
    assert fleet.store.device_samples(device.identity.device_id) == 12


def test_releases_of_two_domains_arrive_one_after_the_other_and_a_rollback_is_followed(fleet, model, device):
    assert [publish(fleet, model, 1, "d1"), publish(fleet, model, 2, "d2"), publish(fleet, model, 3, "d1")] == [1, 2, 3]
    until(lambda: device.running == 3)
    operator = fleet.operator()
    for to in (2, 0):
        request = admin_pb2.RollbackRequest(bundle_digest=model.digest, cohort=COHORT, to_version=to, reason="a test")
        operator.admin.Rollback(request, timeout=20)
        until(lambda to=to: device.running == to == device.updater.version)
    assert publish(fleet, model, 4) == 4
    until(lambda: device.running == 4)
    until(lambda: fleet.store.device(device.identity.device_id).release_version == 4)


def test_a_release_refused_on_the_device_does_not_hold_up_the_next(fleet, model, device):
    device.refuses = {1}
    publish(fleet, model, 1, "d1")
    until(lambda: device.uplink.metrics()["releases_refused"])
    publish(fleet, model, 2, "d2")
    until(lambda: device.running == 2)
