"""The port: gRPC server with TLS, health and reflection around the servicer."""

from __future__ import annotations

import logging
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from edge.inference.handlers import Handlers
from edge.inference.servicer import Servicer
from edge.settings import Inference
from refold.errors import UsageError
from refold.inference import open_inference_pb2 as pb
from refold.inference import open_inference_pb2_grpc as service
from refold.network import join
from refold.network.tls import load_authority, load_pair

__all__ = ["InferenceServer"]

log = logging.getLogger(__name__)
NAME = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
GRACE = 5.0  # seconds running requests get at the end
ENVELOPE = 65536  # bytes of a request around its tensors


class InferenceServer:
    """Listens from construction on. `port` is the one that was bound.

    Raises:
        UsageError: the address cannot be bound, or a TLS file cannot be used.
    """

    def __init__(self, handlers: Handlers, settings: Inference) -> None:
        limit = settings.max_mb * 2**20 + ENVELOPE
        self._pool = futures.ThreadPoolExecutor(settings.threads, thread_name_prefix="inference")
        self._server = grpc.server(
            self._pool,
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=settings.threads * 16,
        )
        add_servicer: Any = service.add_GRPCInferenceServiceServicer_to_server
        add_servicer(Servicer(handlers), self._server)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        address = join(settings.host, settings.port or 0)
        self._handlers = handlers
        try:
            if settings.certificate or settings.key or settings.client_ca:
                self.port = self._server.add_secure_port(address, _credentials(settings))
            else:
                self.port = self._server.add_insecure_port(address)
        except RuntimeError as e:
            raise UsageError(f"The inference port {address} cannot be opened: is it taken? ({e})", code="port") from e
        if not self.port:
            raise UsageError(f"The inference port {address} cannot be opened: is it taken?", code="port")
        self._server.start()
        for name in ("", NAME):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Refuses new requests, lets running ones finish."""
        self._handlers.ready = False
        self._health.enter_graceful_shutdown()
        self._server.stop(GRACE).wait()
        self._pool.shutdown(wait=False)


def _credentials(settings: Inference) -> grpc.ServerCredentials:
    pair = load_pair(Path(settings.certificate), Path(settings.key))
    if pair.expired():  # served all the same: a device without a battery may only think so
        log.warning("%s expired on %s: clients will refuse it.", settings.certificate, pair.certificate.not_valid_after_utc)
    authority = load_authority(Path(settings.client_ca)) if settings.client_ca else None
    return grpc.ssl_server_credentials(
        [(pair.key_pem, pair.certificate_pem)], authority, require_client_auth=authority is not None
    )
