"""One TLS channel to the cloud: every call has a deadline, can be cancelled from another thread, and fails with a RefoldError.

Unary calls of the synchronous client only: streams and abandoned asynchronous calls leak in today's gRPC (specs: fleet.md §2b).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import grpc

from edge.loops import BusyError
from refold.errors import AccessError, InputError, NetworkError, RefoldError, UsageError
from refold.limits import LIMITS
from refold.network import is_tls, meaning_of, parse_address, reason_of
from refold.v1 import adaptation_pb2_grpc, fleet_pb2_grpc

__all__ = ["Credentials", "Link", "error_of", "open_channel"]

CODE_KEY, RETRY_KEY = "refold-code", "refold-retry-ms"  # trailing metadata of a refusal
DEAD = frozenset({"unavailable", "deadline-exceeded", "tls"})  # nobody answered
RETRY_S, MOST_S = 60.0, 3600.0  # when the other side is exhausted and does not say for how long; and however long it says


class Credentials(Protocol):
    """What TLS needs; PEM. `edge.enrol.Identity` is one."""

    @property
    def certificate_pem(self) -> bytes: ...
    @property
    def key_pem(self) -> bytes: ...
    @property
    def ca_pem(self) -> bytes: ...


def open_channel(
    address: str, ca_pem: bytes, *, key_pem: bytes | None = None, certificate_pem: bytes | None = None, server_name: str = ""
) -> grpc.Channel:
    """A lazy channel that trusts `ca_pem` only. Reconnects by itself, at most every 10 s.

    Raises:
        UsageError: `address` is not host:port.
    """
    try:
        target = str(parse_address(address))
    except ValueError as e:
        raise UsageError(f"The address {address!r} cannot be used: {e}.", code="address") from e
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", 2 * LIMITS.release_bytes),
        ("grpc.initial_reconnect_backoff_ms", 500),
        ("grpc.min_reconnect_backoff_ms", 2000),
        ("grpc.max_reconnect_backoff_ms", 10_000),
        ("grpc.use_local_subchannel_pool", 1),  # a remade channel must not inherit the dead connection
    ]
    if server_name:
        options.append(("grpc.ssl_target_name_override", server_name))
    credentials = grpc.ssl_channel_credentials(ca_pem, key_pem, certificate_pem)
    return grpc.secure_channel(target, credentials, options)


def error_of(error: grpc.RpcError, address: str) -> RefoldError:
    """What a failed call means for the caller; the server's own sentence is passed on."""
    failure: Any = error  # a failed call is both an error and a call, which the stubs cannot say
    call = failure if isinstance(failure, grpc.Call) else None
    code = call.code() if call else grpc.StatusCode.UNKNOWN
    said = str(call.details() or "") if call else str(error)
    metadata = dict(call.trailing_metadata() or ()) if call else {}
    name = str(metadata.get(CODE_KEY) or code.name.lower().replace("_", "-"))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        asked = str(metadata.get(RETRY_KEY, ""))
        return BusyError(f"The cloud asks for patience: {said}", min(int(asked) / 1000, MOST_S) if asked.isdigit() else RETRY_S)
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return AccessError(said or "The cloud does not admit this device.", code=name)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InputError(said or "The cloud does not accept the request.", code=name)
    reason, meaning = reason_of(said), meaning_of(said)
    why = f": {reason}." + (f" {meaning}" if meaning else "") if reason else "."
    if is_tls(said):
        return NetworkError(f"No secure connection to {address}{why}", code="tls", detail=str(error))
    if code is grpc.StatusCode.UNAVAILABLE:
        return NetworkError(f"The cloud at {address} cannot be reached{why}", code="unavailable", detail=said)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return NetworkError(f"The cloud at {address} did not answer in time{why}", code="deadline-exceeded", detail=said)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return NetworkError(
            f"The server at {address} does not know this call: {reason}. Devices call the service's main port (server.port, "
            "7443), enrolment its other one (server.enrol_port, 7444).",
            code=name,
        )
    return NetworkError(f"The cloud at {address} refused: {said or code.name}", code=name)


class Link:
    """The channel and its two services; remade when it seems dead. Thread-safe.

    Args:
        address: host:port.
        identity: certificate, key and CA.
        server_name: name in the server's certificate when it is not the host.
        on_up: called when the cloud answers for the first time, and after it was away; on the calling thread.

    Attributes:
        up: the latest call that ended got an answer.
    """

    def __init__(
        self, address: str, identity: Credentials, server_name: str = "", on_up: Callable[[], None] = lambda: None
    ) -> None:
        self.address = address
        self._on_up = on_up
        self._identity, self._server_name = identity, server_name
        self._lock = threading.Lock()
        self._calls: set[Any] = set()
        self._closed = False
        self.up = False
        self._open()

    def _open(self) -> None:
        i = self._identity
        self._channel = open_channel(
            self.address, i.ca_pem, key_pem=i.key_pem, certificate_pem=i.certificate_pem, server_name=self._server_name
        )
        self.adaptation = adaptation_pb2_grpc.AdaptationStub(self._channel)  # type: ignore[no-untyped-call]
        self.fleet = fleet_pb2_grpc.FleetStub(self._channel)  # type: ignore[no-untyped-call]

    def reset(self, identity: Credentials | None = None) -> None:
        """A new connection, with a new identity after a renewal. Running calls end with a NetworkError."""
        with self._lock:
            if self._closed:
                return
            old, self._identity = self._channel, identity or self._identity
            self.up = False
            self._open()
        old.close()

    def call(self, service: str, method: str, request: Any, seconds: float) -> Any:
        """One unary call, e.g. ("adaptation", "OfferSamples"). Raises a RefoldError (see `error_of`)."""
        with self._lock:
            if self._closed:
                raise NetworkError("The connection is closed.", code="closed")
            future = getattr(getattr(self, service), method).future(request, timeout=seconds)
            self._calls.add(future)
        try:
            answer = future.result()
            self._heard(True)
            return answer
        except grpc.FutureCancelledError:
            raise NetworkError("The call was cancelled.", code="closed") from None
        except grpc.RpcError as e:
            error = error_of(e, self.address)
            if error.code != "cancelled":  # by a reset: says nothing of the cloud
                self._heard(error.code not in DEAD)
            if error.code == "deadline-exceeded":  # a half-open connection looks alive for a quarter of an hour
                self.reset()
            raise error from e
        finally:
            with self._lock:
                self._calls.discard(future)

    def _heard(self, up: bool) -> None:
        with self._lock:
            news, self.up = up and not self.up, up
        if news:
            self._on_up()

    def close(self) -> None:
        """Cancels what is running and closes; at once, from any thread, more than once."""
        with self._lock:
            self._closed = True
            calls = list(self._calls)
        for call in calls:
            call.cancel()
        self._channel.close()
