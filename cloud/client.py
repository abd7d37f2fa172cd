"""An operator's connection to a running service."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import grpc

from cloud.settings import CloudSettings
from refold.errors import AccessError, NetworkError, RefoldError, ReleaseError, UsageError
from refold.network import is_tls, join, meaning_of, reason_of
from refold.network.tls import load_authority, load_pair
from refold.v1 import admin_pb2_grpc

__all__ = ["Operator"]

T = TypeVar("T")
SECONDS = 15.0


class Operator:
    """Calls Admin with the operator's certificate. A context manager.

    Raises (from the constructor):
        UsageError: the files of certificate and key are not there, or are no pair.
        AccessError: the certificate has expired.

    Raises (from `call`):
        NetworkError: the service is away.
        AccessError: the certificate is not an operator's.
        ReleaseError, UsageError: the service refuses, with its sentence.
    """

    def __init__(self, settings: CloudSettings, certificate: Path, key: Path) -> None:
        pair = load_pair(certificate, key, " `refold cloud operator renew` on the server makes them anew.")
        if pair.expired():
            ended = f"{pair.certificate.not_valid_after_utc:%Y-%m-%d}"
            raise AccessError(
                f"{certificate} expired on {ended}: `refold cloud operator renew` on the server.", code="certificate-expired"
            )
        credentials = grpc.ssl_channel_credentials(load_authority(settings.tls.ca), pair.key_pem, pair.certificate_pem)
        if not settings.server.port:
            raise UsageError(
                "server.port is 0, so the service chose its port when it started: set REFOLD_CLOUD_SERVER__PORT to the one it "
                "told."
            )
        host = settings.server.address
        self._address = join({"0.0.0.0": "localhost", "::": "localhost"}.get(host, host), settings.server.port)
        self._channel = grpc.secure_channel(self._address, credentials)
        self.admin = admin_pb2_grpc.AdminStub(self._channel)  # type: ignore[no-untyped-call]

    def call(self, method: Callable[..., T], request: object) -> T:
        try:
            return method(request, timeout=SECONDS)
        except grpc.RpcError as e:
            raise self._error(e) from e

    def _error(self, e: grpc.RpcError) -> RefoldError:
        status, text = e.code(), e.details() or ""
        code = next((str(m.value) for m in e.trailing_metadata() or () if m.key == "refold-code"), None)
        if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return NetworkError(
                f"No service answers at {self._address}: {reason_of(text) or status.name}. "
                f"{meaning_of(text)} Start it with `refold cloud serve`, or check server.address and server.port.",
                code="tls" if is_tls(text) else None,
                detail=text,
            )
        if status is grpc.StatusCode.UNIMPLEMENTED:
            return NetworkError(
                f"The server at {self._address} does not know this call: check server.port.", code="unimplemented"
            )
        if status in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
            return AccessError(text, code=code)
        if status is grpc.StatusCode.FAILED_PRECONDITION:
            return ReleaseError(text, code=code)
        if status is grpc.StatusCode.INVALID_ARGUMENT:
            return UsageError(text, code=code)
        return RefoldError(text or f"The service answered {status.name}.", code=code)

    def __enter__(self) -> Operator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._channel.close()
