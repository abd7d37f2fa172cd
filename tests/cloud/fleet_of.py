"""A whole fleet on loopback for the tests: directory, service, devices with certificates, a bundle whose engine runs."""

from __future__ import annotations

import asyncio
import hashlib
import io
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from numpy.typing import NDArray
from PIL import Image

from cloud.enrol import make_token
from cloud.provision import LOCAL, provision
from cloud.server import Cloud
from cloud.settings import CloudSettings, load_settings
from cloud.store import Store
from edge.engine import EngineFactory
from edge.serving import ServingState
from refold.bundle import Bundle, write_bundle
from refold.codec import table_to_pb
from refold.norms import NormState, unfold_moments
from refold.statistics import Layout, within_trust
from refold.v1 import adaptation_pb2, adaptation_pb2_grpc, admin_pb2_grpc, fleet_pb2, fleet_pb2_grpc, manifest_pb2
from refold.v1 import samples_pb2 as pb

sys.path.append(str(Path(__file__).parents[1] / "edge"))
from small_nets import TARGET, images, residual_net

SIDE, CLASSES, COHORT = 16, 5, "roof"


def shifted(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures in the mist: less contrast, brighter. `cleared` undoes it up to rounding."""
    return (images * 0.4 + 140).astype(np.uint8)


def cleared(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.clip((images.astype(np.float64) - 140) / 0.4, 0, 255).astype(np.uint8)


def make_bundle(path: Path) -> Bundle:
    """A bundle whose engine runs; the calibration labels are its own answers. The student is never opened by these tests."""
    model, taps, table, pictures, preprocess = residual_net(size=SIDE, classes=CLASSES)
    manifest = manifest_pb2.Manifest(
        name="small", class_count=CLASSES, student="student.pt2", calibration="calibration.npz", input_name="input"
    )
    manifest.preprocess.CopyFrom(preprocess.to_pb())
    manifest.norms.CopyFrom(table_to_pb(table))
    manifest.targets.add(name=TARGET, model="model.onnx", taps="taps.onnx", updatable=True)
    slice_ = io.BytesIO()
    np.savez(slice_, images=pictures)
    parts = {"model.onnx": model, "taps.onnx": taps, "student.pt2": b"not opened here", "calibration.npz": slice_.getvalue()}
    return write_bundle(path, manifest, parts)


def sample(bundle: Bundle, image: NDArray[np.uint8], domain: str = "d1", *, raw: bool = False, **header: Any) -> pb.Sample:
    """A real upload of one picture; `header` overrides its fields."""
    if raw:
        codec, payload = pb.IMAGE_CODEC_RAW_RGB8, image.tobytes()
    else:
        out = io.BytesIO()
        Image.fromarray(image).save(out, "WEBP", lossless=True)
        codec, payload = pb.IMAGE_CODEC_WEBP_LOSSLESS, out.getvalue()
    values = {
        "digest": hashlib.sha256(payload).hexdigest(),
        "bundle_digest": bundle.digest,
        "preprocess_digest": bundle.preprocess.digest,
        "width": image.shape[1],
        "height": image.shape[0],
        "codec": codec,
        "size": len(payload),
        "domain": domain,
        "unbiased": True,
        **header,
    }
    return pb.Sample(header=pb.SampleHeader(**values), payload=payload)


def pictures(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def request_pem(key: ec.EllipticCurvePrivateKey, name: str = "Gate 7") -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


class Caller:
    """A client with a certificate: stubs of all services."""

    def __init__(self, address: str, ca: bytes, key: bytes | None = None, certificate: bytes | None = None) -> None:
        self.channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate))
        self.adaptation = adaptation_pb2_grpc.AdaptationStub(self.channel)
        self.fleet = fleet_pb2_grpc.FleetStub(self.channel)
        self.admin = admin_pb2_grpc.AdminStub(self.channel)

    def upload(self, *samples: pb.Sample) -> adaptation_pb2.UploadSamplesResponse:
        return self.adaptation.UploadSamples(adaptation_pb2.UploadSamplesRequest(samples=samples), timeout=20)

    def offer(self, *samples: pb.Sample) -> adaptation_pb2.OfferSamplesResponse:
        return self.adaptation.OfferSamples(adaptation_pb2.OfferSamplesRequest(headers=[s.header for s in samples]), timeout=20)

    def poll(
        self, bundle: Bundle, installed: int = 0, wait_ms: int = 0, cohort: str = ""
    ) -> adaptation_pb2.PollReleaseResponse:
        request = adaptation_pb2.PollReleaseRequest(
            bundle_digest=bundle.digest, installed_version=installed, wait_ms=wait_ms, cohort=cohort
        )
        return self.adaptation.PollRelease(request, timeout=wait_ms / 1000 + 20)

    def close(self) -> None:
        self.channel.close()


class Fleet:
    """A fleet directory, and a service of it that runs in this process. A context manager."""

    def __init__(self, directory: Path, environment: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self.config = directory / "cloud.toml"
        if not self.config.exists():
            provision(directory, LOCAL, 0, 0, "127.0.0.1")
        self.settings: CloudSettings = load_settings(self.config, environment or {})
        self.cloud = Cloud(self.settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._callers: list[Caller] = []

    def __enter__(self) -> Fleet:
        self._thread.start()
        self._run(self.cloud.start())
        return self

    def __exit__(self, *exc: object) -> None:
        for caller in self._callers:
            caller.close()
        self._run(self.cloud.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    @property
    def store(self) -> Store:
        return self.cloud._store

    @property
    def ca(self) -> bytes:
        return (self.directory / "ca.pem").read_bytes()

    def token(self, cohort: str = COHORT, hours: float = 1.0, uses: int = 1) -> str:
        return make_token(self.store, cohort, hours, uses)

    def stranger(self) -> Caller:
        """Somebody without a certificate, at the enrolment port."""
        return self._keep(Caller(f"localhost:{self.cloud.enrol_port}", self.ca))

    def caller(self, key: bytes | None, certificate: bytes | None) -> Caller:
        return self._keep(Caller(f"localhost:{self.cloud.port}", self.ca, key, certificate))

    def operator(self) -> Caller:
        return self.caller((self.directory / "operator.key").read_bytes(), (self.directory / "operator.pem").read_bytes())

    def device(self, name: str = "Gate 7", cohort: str = COHORT) -> Caller:
        """A newly enrolled device. Its id is `caller.id`."""
        key = ec.generate_private_key(ec.SECP256R1())
        answer = self.enrol(key, self.token(cohort), name)
        caller = self.caller(key_pem(key), answer.certificate_pem)
        caller.id, caller.key, caller.answer = answer.device_id, key, answer  # type: ignore[attr-defined]
        return caller

    def enrol(self, key: ec.EllipticCurvePrivateKey, token: str, name: str = "Gate 7") -> fleet_pb2.EnrollResponse:
        request = fleet_pb2.EnrollRequest(join_token=token, csr_pem=request_pem(key, name))
        return self.stranger().fleet.Enroll(request, timeout=20)

    def _keep(self, caller: Caller) -> Caller:
        self._callers.append(caller)
        return caller


def statistics(bundle: Bundle, means: Mapping[str, Any], variances: Mapping[str, Any], **values: Any) -> pb.StatisticsReport:
    """A report of the given population; its digest covers its content."""
    report = pb.StatisticsReport(**{"bundle_digest": bundle.digest, "domain": "d1", "frames": 64, **values})
    for name, mean in means.items():
        report.sites.add(site=name, mean=mean, variance=variances[name])
    report.digest = hashlib.sha256(report.SerializeToString(deterministic=True)).hexdigest()
    return report


ROUNDS = 20  # until the statistics stay


def population(bundle: Bundle, images: NDArray[np.uint8]) -> tuple[dict[str, NormState], pb.StatisticsReport]:
    """The states that a population's statistics make, and the report of them.

    Each round measures behind the norms that the round before corrected.
    """
    layout, factory, x = Layout(bundle.norms), EngineFactory(bundle), bundle.preprocess.apply(images)
    states: dict[str, NormState] = {}
    for _ in range(ROUNDS):
        moments = factory.build_taps(ServingState(states)).run(x).mean(0, dtype=np.float64).astype(np.float32)
        found = {
            s.name: unfold_moments(s, states.get(s.name, s.exported), moments[0, cut], moments[1, cut])
            for s, cut in zip(layout.sites, layout.slices, strict=True)
        }
        states = {s.name: within_trust(s, s.exported.with_statistics(*found[s.name]), 8.0) for s in layout.sites}
    means = {name: state.mean for name, state in states.items()}
    return states, statistics(bundle, means, {name: state.variance for name, state in states.items()})


def send_population(device: Caller, bundle: Bundle, count: int = 48, seed: int = 3, domain: str = "d1") -> None:
    """Pictures in the mist and the statistics a device would have tapped from them."""
    misty = shifted(images(count, 16, seed))
    _, report = population(bundle, misty)
    report.domain = domain
    device.adaptation.UploadStatistics(adaptation_pb2.UploadStatisticsRequest(report=report), timeout=20)
    assert len(device.upload(*[sample(bundle, p, domain) for p in misty]).stored) == count


def workers_of(pid: int) -> list[psutil.Process]:
    """The worker processes: spawned children that are not multiprocessing's resource tracker."""
    return [p for p in psutil.Process(pid).children() if "spawn_main" in " ".join(p.cmdline())]
