"""Start, two ports, stop. `Cloud` owns every long-lived part; its `close` undoes its `start` in reverse order."""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cloud.board import Board
from cloud.bundles import register
from cloud.enrol import Enrolment
from cloud.fleet.operators import SOON_DAYS, Operators, adopt_file
from cloud.identity import Authority
from cloud.ingest import Ingest
from cloud.releases import Releases
from cloud.retention import collect
from cloud.service import AdaptationService, AdminService, EnrolService, FleetService, Rooms
from cloud.settings import CloudSettings, TlsSettings
from cloud.store import DirectoryObjects, Store
from cloud.telemetry import MetricsServer
from cloud.upkeep import Round
from cloud.workers import Supervisor
from refold.errors import RefoldError, UsageError
from refold.network import join
from refold.network.tls import load_pair
from refold.signing import SigningKey
from refold.v1 import adaptation_pb2, adaptation_pb2_grpc, admin_pb2, admin_pb2_grpc, fleet_pb2, fleet_pb2_grpc

__all__ = ["Cloud"]

log = logging.getLogger(__name__)
MADE_BY = " `refold cloud init` makes them, `refold cloud renew-server` a new pair."
ENROL_BYTES = 64 * 1024  # of a message on the port where anybody may call; a request has under 1 KB
THREADS = 16  # each holds a database connection for milliseconds
CHECK_S = 5.0  # between two looks at readiness
COLLECT_S = 600.0  # between two rounds of retention
SERVICES = (
    adaptation_pb2.DESCRIPTOR.services_by_name["Adaptation"].full_name,
    fleet_pb2.DESCRIPTOR.services_by_name["Fleet"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name,
)


class Cloud:
    """The running service. `port` and `enrol_port` are what it listens on after `start`.

    Raises (from the constructor and `start`):
        UsageError: a certificate, key, port or bundle of the settings cannot be used.
        StorageError: the database or the object directory cannot.
    """

    def __init__(self, settings: CloudSettings) -> None:
        self.settings = settings
        self.port = self.enrol_port = self.metrics_port = 0
        self._authority = Authority.load(settings.tls.ca, settings.tls.ca_key)
        self._pair = _server_pair(settings.tls, self._authority)
        self._key = SigningKey.load(settings.tls.release_key)
        self._trusted = [self._key.public, *_public_keys(settings.tls.more_release_keys)]
        self._objects = DirectoryObjects(settings.storage.objects, settings.storage.free_bytes)
        self._store = Store(settings.storage.database)
        self._operators = Operators(self._store.operators)
        self._servers: list[grpc.aio.Server] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._metrics: MetricsServer | None = None
        self._retention = Round("Retention", self._collect, COLLECT_S)

    async def start(self) -> None:
        """Returns when both ports answer."""
        adopt_file(self._store.operators, self.settings.tls.ca.parent / "operator.pem", self._authority)
        for entry in self.settings.bundle:
            register(self._store, self._objects, entry.path, [(t.spec, t.weights) for t in entry.teachers])
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="rooms")
        self._board = Board()
        releases = Releases(
            self._store, self._key, self._board.notify, self._rolled_back, valid_days=self.settings.releases.valid_days
        )
        self._supervisor = Supervisor(self.settings, self._store, self._objects, releases)
        ingest = Ingest(
            self._store, self._objects, self.settings.quota, self.settings.workers.held_back, self._supervisor.notify
        )
        enrolment = Enrolment(self._store, self._authority, self._trusted, self.settings.tls.device_days, self.settings.quota)
        does, waits = self._supervisor.status, self._supervisor.waiting
        rooms = Rooms(
            self._store, ingest, enrolment, releases, self._board, self.settings.devices, self._pool, does, waits,
            self._operators, self._warnings,
        )  # fmt: skip
        self._health = health.aio.HealthServicer()
        await self._start_main(rooms)
        await self._start_enrolment(rooms)
        if self.settings.server.metrics_port:
            self._metrics = MetricsServer(self.settings.server.metrics_port)
            self.metrics_port = self._metrics.port
        self._supervisor.start()
        await self._set_ready(True)
        self._tasks = [asyncio.create_task(self._watch_readiness()), asyncio.create_task(self._retention.keep(self._pool))]

    def _rolled_back(self, bundle_digest: str, cohort: str) -> None:
        self._supervisor.renew(bundle_digest, cohort)

    def _server(self, message_bytes: int) -> grpc.aio.Server:
        settings = self.settings.server
        options: list[tuple[str, Any]] = [
            ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake, not load balancing
            ("grpc.max_receive_message_length", message_bytes),
            ("grpc.max_send_message_length", message_bytes),
            ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=settings.concurrent_calls)
        self._servers.append(server)
        return server

    def _bind(self, server: grpc.aio.Server, port: int, credentials: grpc.ServerCredentials, name: str) -> int:
        address = join(self.settings.server.address, port)
        try:
            bound = server.add_secure_port(address, credentials)
        except RuntimeError as e:
            bound, detail = 0, str(e)
        else:
            detail = ""
        if not bound:
            raise UsageError(
                f"{address} cannot be listened on: another program does, or the address is not this machine's. "
                f"Change server.{name}.",
                code="port-in-use",
                detail=detail,
            )
        return bound

    async def _start_main(self, rooms: Rooms) -> None:
        server = self._server(self.settings.server.message_bytes)
        fleet_pb2_grpc.add_FleetServicer_to_server(FleetService(rooms), server)  # type: ignore[no-untyped-call]
        adaptation_pb2_grpc.add_AdaptationServicer_to_server(AdaptationService(rooms), server)  # type: ignore[no-untyped-call]
        admin_pb2_grpc.add_AdminServicer_to_server(AdminService(rooms), server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection([*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        mutual = grpc.ssl_server_credentials([self._pair], self._authority.pem, require_client_auth=True)
        self.port = self._bind(server, self.settings.server.port, mutual, "port")
        await server.start()

    async def _start_enrolment(self, rooms: Rooms) -> None:
        server = self._server(ENROL_BYTES)
        fleet_pb2_grpc.add_FleetServicer_to_server(EnrolService(rooms), server)  # type: ignore[no-untyped-call]
        one_sided = grpc.ssl_server_credentials([self._pair])
        self.enrol_port = self._bind(server, self.settings.server.enrol_port, one_sided, "enrol_port")
        await server.start()

    async def _set_ready(self, ready: bool) -> None:
        word = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *SERVICES):
            await self._health.set(name, word)

    async def _watch_readiness(self) -> None:
        was = True
        while True:
            await asyncio.sleep(CHECK_S)
            ready = await asyncio.get_running_loop().run_in_executor(self._pool, self._ready)
            if ready != was:
                await self._set_ready(ready)
                was = ready

    def _ready(self) -> bool:
        """Ready is: the database takes writes and the disk has room."""
        try:
            self._store.check()
            if self._objects.free() <= 0:
                log.warning("Not ready: %s has no room left.", self._objects.root)
                return False
            return True
        except (RefoldError, OSError) as e:
            log.warning("Not ready: %s", e)
        except Exception:  # whatever it is: a service that cannot tell is not ready, and looks again
            log.exception("Not ready")
        return False

    def _warnings(self) -> list[str]:
        """What an operator should see to."""
        certificates = expiring(self.settings.tls, self._pair[1], self._authority)
        return [*self._operators.warnings(), *certificates, *filter(None, [self._retention.warning])]

    def _collect(self) -> None:
        collect(self._store, self._objects, self.settings.storage)

    async def close(self) -> None:
        """Answers held polls, gives running calls their grace, then ends the workers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if hasattr(self, "_board"):
            self._board.close()
            await self._health.enter_graceful_shutdown()
            await asyncio.gather(*(s.stop(self.settings.server.grace_s) for s in self._servers))
            began = time.monotonic()
            await asyncio.get_running_loop().run_in_executor(None, self._supervisor.close)
            log.info("workers ended in %.1f s", time.monotonic() - began)
            self._pool.shutdown()
        if self._metrics:
            self._metrics.close()
        self._store.close()


def _public_keys(texts: tuple[str, ...]) -> list[bytes]:
    try:
        keys = [bytes.fromhex(t) for t in texts]
    except ValueError:
        keys = [b""]
    if any(len(k) != 32 for k in keys):
        raise UsageError("tls.more_release_keys: a public key is 64 hex digits.")
    return keys


def _server_pair(tls: TlsSettings, authority: Authority) -> tuple[bytes, bytes]:
    """(key, certificate) in PEM, checked: gRPC itself would start with a bad pair and then refuse every caller."""
    pair = load_pair(tls.certificate, tls.key, MADE_BY)
    loaded = pair.certificate
    if pair.expired():
        raise UsageError(
            f"{tls.certificate} expired on {loaded.not_valid_after_utc:%Y-%m-%d}: `refold cloud renew-server` makes a new one.",
            code="certificate",
        )
    try:
        loaded.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.pem))
    except (ValueError, TypeError, InvalidSignature) as e:
        raise UsageError(
            f"{tls.certificate} was not issued by {tls.ca}: devices, which know only that authority, would refuse it.",
            code="certificate",
        ) from e
    return pair.key_pem, pair.certificate_pem


def expiring(tls: TlsSettings, certificate: bytes, authority: Authority) -> list[str]:
    """A sentence for the server's certificate and the authority's when they end within SOON_DAYS or, the latter, a year."""
    now, found = datetime.datetime.now(datetime.timezone.utc), []
    ends = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
    if ends < now + datetime.timedelta(days=SOON_DAYS):
        found.append(f"{tls.certificate} expires on {ends:%Y-%m-%d}: `refold cloud renew-server`, then restart the service.")
    ends = x509.load_pem_x509_certificate(authority.pem).not_valid_after_utc
    if ends < now + datetime.timedelta(days=365):
        found.append(
            f"The fleet's authority {tls.ca} expires on {ends:%Y-%m-%d}: found a new fleet and enrol the devices there."
        )
    return found
