"""What every call has in common: who asks, how long it took, and what an error looks like from outside.

    UsageError, InputError, NormStateError  INVALID_ARGUMENT       AccessError   PERMISSION_DENIED or UNAUTHENTICATED
    StorageError, QuotaError                RESOURCE_EXHAUSTED     other RefoldErrors   FAILED_PRECONDITION
    anything else                           INTERNAL, with an id that is also in the log

The error's stable code travels as trailing metadata `refold-code`, a requested delay as `refold-retry-ms`.
"""

from __future__ import annotations

import functools
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc

from cloud.identity import Peer, peer_of
from cloud.telemetry import CALLS, SECONDS
from refold.errors import AccessError, InputError, NormStateError, RefoldError, StorageError, UsageError

__all__ = ["QuotaError", "answers", "peer_in"]

log = logging.getLogger(__name__)
Request = TypeVar("Request")
Response = TypeVar("Response")
Handler = Callable[[Any, Request, Peer], Awaitable[Response]]


class QuotaError(RefoldError):
    """A device asked for more than its share; `retry_after_ms` says when it may come back."""

    default_code = "quota"

    def __init__(self, message: str, retry_after_ms: int) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


def status_of(error: RefoldError) -> grpc.StatusCode:
    if isinstance(error, AccessError):
        return grpc.StatusCode.UNAUTHENTICATED if error.code == "no-certificate" else grpc.StatusCode.PERMISSION_DENIED
    if isinstance(error, (UsageError, InputError, NormStateError)):
        return grpc.StatusCode.INVALID_ARGUMENT
    if isinstance(error, (StorageError, QuotaError)):
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    return grpc.StatusCode.FAILED_PRECONDITION


def peer_in(context: grpc.aio.ServicerContext[Any, Any]) -> Peer:
    """The caller, from the certificate its TLS session was opened with. Raises AccessError without one."""
    pem = next(iter(context.auth_context().get("x509_pem_cert", ())), None)
    if pem is None:
        raise AccessError("This call needs a client certificate, on the main port.", code="no-certificate")
    return peer_of(bytes(pem))


def answers(role: str | None) -> Callable[[Handler[Request, Response]], Callable[..., Awaitable[Response]]]:
    """Makes a gRPC method of `handler(self, request, peer)`.

    Args:
        role: the role that a caller's certificate must prove; None admits callers without a certificate, whose peer has no id.
    """

    def decorate(handler: Handler[Request, Response]) -> Callable[..., Awaitable[Response]]:
        name = handler.__name__

        @functools.wraps(handler)
        async def method(self: Any, request: Request, context: grpc.aio.ServicerContext[Any, Any]) -> Response:
            began, outcome = time.perf_counter(), "ok"
            try:
                peer = _admitted(context, role)
                return await handler(self, request, peer)
            except RefoldError as e:
                outcome = e.code
                log.info("%s refused: %s", name, e.message, extra={"code": e.code, "detail": e.detail})
                trailing = [("refold-code", e.code)]
                if isinstance(e, QuotaError):
                    trailing.append(("refold-retry-ms", str(e.retry_after_ms)))
                await context.abort(status_of(e), e.message, tuple(trailing))
            except Exception:
                outcome = "internal"
                incident = secrets.token_hex(4)
                log.exception("%s failed, incident %s", name, incident)
                message = f"The server failed; its log has the reason under incident {incident}."
                await context.abort(grpc.StatusCode.INTERNAL, message, (("refold-code", "internal"),))
            finally:
                CALLS.add(1, method=name, outcome=outcome)
                SECONDS.add(time.perf_counter() - began, method=name)
            raise AssertionError("abort raises")

        return method

    return decorate


def _admitted(context: grpc.aio.ServicerContext[Any, Any], role: str | None) -> Peer:
    if role is None:
        try:
            return peer_in(context)
        except AccessError:
            return Peer("", "", "")
    peer = peer_in(context)
    if peer.role != role:
        raise AccessError(f"This call is for {role}s; {peer.id} is a {peer.role}.", code="wrong-role")
    if peer.expires_ms <= time.time() * 1000:  # a TLS session that was opened before outlives it
        raise AccessError(
            f"The certificate of {peer.id} has expired: renew it, then connect again.", code="certificate-expired"
        )
    return peer
