"""An operator's connection to a running service."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from cloud.settings import CloudSettings
from refold.errors import AccessError, NetworkError, RefoldError, ReleaseError, UsageError
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
        try:
            ca, private, own = settings.tls.ca.read_bytes(), key.read_bytes(), certificate.read_bytes()
        except OSError as e:
            raise UsageError(f"{e.filename} cannot be read: {e.strerror}.") from e
        _check_pair(certificate, own, key, private)
        credentials = grpc.ssl_channel_credentials(ca, private, own)
        host = settings.server.address
        host = {"0.0.0.0": "localhost", "[::]": "localhost", "::": "localhost"}.get(host, host)
        self._address = f"{host}:{settings.server.port}"
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
                f"No service answers at {self._address}: start it with `refold cloud serve`, or check server.address and the "
                "certificates.",
                detail=text,
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


def _check_pair(certificate: Path, pem: bytes, key: Path, private: bytes) -> None:
    """What would otherwise end in a handshake that fails without a reason.

    Raises:
        UsageError: the files are not a certificate and its key.
        AccessError: the certificate has expired.
    """
    try:
        loaded = x509.load_pem_x509_certificate(pem)
        own = serialization.load_pem_private_key(private, password=None).public_key() == loaded.public_key()
    except (ValueError, TypeError):
        own = False
    if not own:
        raise UsageError(
            f"{certificate} and {key} are not a certificate and its unencrypted key (PEM): `refold cloud operator renew` on "
            "the server makes them anew.",
            code="certificate",
        )
    if loaded.not_valid_after_utc <= datetime.datetime.now(datetime.timezone.utc):
        raise AccessError(
            f"{certificate} expired on {loaded.not_valid_after_utc:%Y-%m-%d}: `refold cloud operator renew` on the server.",
            code="certificate-expired",
        )
