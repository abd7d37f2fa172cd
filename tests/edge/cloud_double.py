"""A small real cloud for the device's tests: gRPC with mutual TLS on loopback, its store a dictionary, its moods settable."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent import futures
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from edge.enrol import Identity
from refold import SigningKey
from refold.v1 import adaptation_pb2 as pb
from refold.v1 import adaptation_pb2_grpc, fleet_pb2, fleet_pb2_grpc

RELEASE_KEY = SigningKey.generate()


def until(true: Callable[[], object], seconds: float = 30.0) -> None:
    """Waits for something that another thread will bring about; fails when it does not come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


class Authority:
    """A certificate authority in memory."""

    def __init__(self, name: str = "test-fleet") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.pem = self._sign(self.name, self.key.public_key(), authority=True)

    def _sign(
        self,
        name: x509.Name,
        public: Any,
        *,
        days: tuple[float, float] = (0.0, 1.0),
        host: bool = False,
        authority: bool = False,
    ) -> bytes:
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=days[0], minutes=5))
            .not_valid_after(now + datetime.timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if host:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def server(self) -> tuple[bytes, bytes]:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cloud")])
        return key_pem(key), self._sign(name, key.public_key(), host=True)

    def device(self, public: Any, device_id: str, days: tuple[float, float] = (0.0, 1.0)) -> bytes:
        return self._sign(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device_id)]), public, days=days)

    def identity(self, days: tuple[float, float] = (0.0, 1.0), trusts: Authority | None = None) -> Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.device(key.public_key(), "dev-1", days)
        return Identity("dev-1", "roof", certificate, key_pem(key), (trusts or self).pem, (RELEASE_KEY.public,))


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


class Cloud(adaptation_pb2_grpc.AdaptationServicer, fleet_pb2_grpc.FleetServicer):
    """Both services on one port.

    Attributes:
        moods: method name to a list of callables(context, request) that are used up one per call, before it is answered.
        after: the same, run after the call had its effect: an exception there loses the acknowledgement.
        answer_poll: says what a poll brings; None keeps it waiting.
    """

    def __init__(self, authority: Authority, *, mutual: bool = True) -> None:
        self.authority = authority
        self.mutual = mutual
        self.pair = authority.server()
        self.calls: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.samples: dict[str, bytes] = {}
        self.stored: Counter[str] = Counter()
        self.offers: list[list[str]] = []
        self.batches: list[int] = []
        self.unwanted: set[str] = set()
        self.refusals: dict[str, str] = {}
        self.reports: dict[str, Any] = {}
        self.heartbeats: list[fleet_pb2.HeartbeatRequest] = []
        self.polls: list[pb.PollReleaseRequest] = []
        self.enrolments: list[fleet_pb2.EnrollRequest] = []
        self.peers: list[str] = []
        self.moods: dict[str, list[Callable[[Any, Any], None]]] = {}
        self.after: dict[str, list[Callable[[Any, Any], None]]] = {}
        self.retry_after_ms = 0
        self.latest = 0
        self.answer_poll: Callable[[pb.PollReleaseRequest], pb.PollReleaseResponse | None] = lambda request: None
        self.tokens = {"good": "roof"}
        self.certificate_days = (0.0, 1.0)
        self._stop = threading.Event()
        self.port = 0
        self.server: grpc.Server | None = None

    def start(self, port: int = 0) -> int:
        self._stop.clear()
        self.server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        adaptation_pb2_grpc.add_AdaptationServicer_to_server(self, self.server)
        fleet_pb2_grpc.add_FleetServicer_to_server(self, self.server)
        authority = self.authority.pem if self.mutual else None
        credentials = grpc.ssl_server_credentials([self.pair], authority, require_client_auth=self.mutual)
        until(lambda: self._bind(port, credentials))
        self.server.start()
        return self.port

    def _bind(self, port: int, credentials: grpc.ServerCredentials) -> bool:
        try:
            assert self.server is not None
            self.port = self.server.add_secure_port(f"127.0.0.1:{port}", credentials)
        except RuntimeError:  # the port of a server that was stopped a moment ago
            return False
        return True

    def stop(self) -> None:
        self._stop.set()
        if self.server is not None:
            self.server.stop(None).wait()
            self.server = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _enter(self, method: str, context: Any, request: Any) -> None:
        self.calls[method] += 1
        self.times.setdefault(method, []).append(time.monotonic())
        if self.moods.get(method):
            self.moods[method].pop(0)(context, request)

    def _leave(self, method: str, context: Any, request: Any) -> None:
        if self.after.get(method):
            self.after[method].pop(0)(context, request)

    def OfferSamples(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._enter("OfferSamples", context, request)
        self.offers.append([h.digest for h in request.headers])
        known = self.unwanted | set(self.samples)
        retry, self.retry_after_ms = self.retry_after_ms, 0
        wanted = [] if retry else [h.digest for h in request.headers if h.digest not in known]
        self._leave("OfferSamples", context, request)
        return pb.OfferSamplesResponse(
            wanted=wanted, unwanted=[h.digest for h in request.headers if h.digest in known], retry_after_ms=retry
        )

    def UploadSamples(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._enter("UploadSamples", context, request)
        self.batches.append(request.ByteSize())
        answer = pb.UploadSamplesResponse()
        for sample in request.samples:
            digest = sample.header.digest
            if digest in self.refusals:
                answer.refused.add(digest=digest, code=self.refusals[digest], message="no")
                continue
            assert hashlib.sha256(sample.payload).hexdigest() == digest
            self.stored[digest] += digest not in self.samples
            self.samples[digest] = sample.payload
            answer.stored.append(digest)
        self._leave("UploadSamples", context, request)
        return answer

    def UploadStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._enter("UploadStatistics", context, request)
        self.reports[request.report.digest] = request.report
        self._leave("UploadStatistics", context, request)
        return pb.UploadStatisticsResponse()

    def PollRelease(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._enter("PollRelease", context, request)
        self.polls.append(request)
        end = time.monotonic() + request.wait_ms / 1000
        while True:
            answer = self.answer_poll(request)
            if answer is not None:
                return answer
            if time.monotonic() >= end or self._stop.wait(0.02) or not context.is_active():
                return pb.PollReleaseResponse()

    def Heartbeat(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._enter("Heartbeat", context, request)
        self.heartbeats.append(request)
        certificate = x509.load_pem_x509_certificate(context.auth_context()["x509_pem_cert"][0])
        self.peers.append(f"{certificate.serial_number:x}")
        return fleet_pb2.HeartbeatResponse(latest_release_version=self.latest)

    def Enroll(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._enter("Enroll", context, request)
        self.enrolments.append(request)
        if not self.mutual and request.join_token not in self.tokens:
            metadata = (("refold-code", "bad-token"),)
            context.abort_with_status(_Status(grpc.StatusCode.PERMISSION_DENIED, "The join token was used up.", metadata))
        csr = x509.load_pem_x509_csr(request.csr_pem)
        assert csr.is_signature_valid
        certificate = self.authority.device(csr.public_key(), "dev-1", self.certificate_days)
        self._leave("Enroll", context, request)
        return fleet_pb2.EnrollResponse(
            device_id="dev-1",
            certificate_pem=certificate,
            ca_pem=self.authority.pem,
            release_keys=[RELEASE_KEY.public],
            cohort=self.tokens.get(request.join_token, request.cohort),
        )


class _Status(grpc.Status):
    def __init__(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> None:
        self.code, self.details, self.trailing_metadata = code, details, trailing_metadata


def fail(code: grpc.StatusCode, details: str = "as told", **metadata: str) -> Callable[[Any, Any], None]:
    """A mood: the call fails with this status."""

    def mood(context: Any, request: Any) -> None:
        pairs = tuple((k.replace("_", "-"), v) for k, v in metadata.items())
        context.abort_with_status(_Status(code, details, pairs))

    return mood
