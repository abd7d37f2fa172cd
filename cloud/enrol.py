"""How a device comes in, stays in and is put out: join token, certificate, renewal, heartbeat, revocation."""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import time
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from cloud.fleet.plausible import printable
from cloud.identity import Authority, Peer, read_request
from cloud.quota import Buckets
from cloud.rpc import QuotaError
from cloud.settings import QuotaSettings
from cloud.store import DeviceRecord, Store
from refold.errors import AccessError, InputError, UsageError
from refold.v1 import fleet_pb2 as pb

__all__ = ["COHORT", "Enrolment", "make_token"]

COHORT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
METRICS = 64  # snapshot entries of one heartbeat
TOKEN_HOURS, TOKEN_USES = 87_600, 1_000_000  # ten years; more devices than one service holds
ID_DIGITS = 32  # 128 bits: nobody finds a second key for an id; 48 bits, as before, are within reach
TEXT = 512  # characters of a device's last error


def make_token(store: Store, cohort: str, hours: float, uses: int) -> str:
    """A join token, told once and stored as its hash.

    Raises:
        UsageError: a cohort's name with other characters than letters, digits, dots, dashes and underscores; no lifetime.
    """
    if cohort and not COHORT.fullmatch(cohort):
        raise UsageError(f"{cohort!r} is not a cohort's name: letters, digits, '.', '-' and '_', at most 64.")
    if not (0 < hours <= TOKEN_HOURS and 1 <= uses <= TOKEN_USES):
        raise UsageError(
            f"A join token lasts more than 0 and at most {TOKEN_HOURS:,} hours, and can be used 1 to {TOKEN_USES:,} times."
        )
    token = secrets.token_urlsafe(24)
    store.add_token(token, cohort, uses, int((time.time() + hours * 3600) * 1000))
    return token


def key_digest(request: x509.CertificateSigningRequest) -> str:
    """SHA-256 of the public key, 64 hex digits."""
    key = request.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key).hexdigest()


def device_id(request: x509.CertificateSigningRequest) -> str:
    """The wanted name, made safe, and 128 bits of the key's digest: stable for a key, and no other key can be made to fit it.

    64 characters at most, as many as a common name may have (RFC 5280, ub-common-name).
    """
    wanted = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    name = re.sub(r"[^a-z0-9]+", "-", str(wanted[0].value).lower())[:31].strip("-") if wanted else ""
    return f"{name or 'device'}-{key_digest(request)[:ID_DIGITS]}"


class Enrolment:
    """Devices of one fleet. `release_keys`: raw public keys that devices are told to trust."""

    def __init__(
        self, store: Store, authority: Authority, release_keys: Sequence[bytes], device_days: float, quota: QuotaSettings
    ) -> None:
        self._store, self._authority = store, authority
        self._release_keys, self._days = list(release_keys), device_days
        self._calls = Buckets(quota.calls_per_minute, 60.0)

    def enrol(self, request: pb.EnrollRequest) -> pb.EnrollResponse:
        """Buys a certificate with a join token. The same key may ask again with the same token: an answer can get lost.

        Raises:
            AccessError: a bad token or certificate request, or a revoked device.
        """
        csr = read_request(request.csr_pem)
        wanted = request.cohort or "default"
        if not COHORT.fullmatch(wanted):
            raise InputError("A cohort's name has letters, digits, '.', '-' and '_', at most 64.", code="cohort")
        device, key = device_id(csr), key_digest(csr)
        self._store.check_key(device, key)  # before the token is spent
        return self._issue(csr, device, self._store.redeem(request.join_token, device) or wanted, key)

    def renew(self, peer: Peer, request: pb.EnrollRequest) -> pb.EnrollResponse:
        """A new certificate for a device that shows a valid one; its id and cohort stay."""
        device = self.admit(peer)
        return self._issue(read_request(request.csr_pem), device.id, device.cohort)

    def _issue(
        self, csr: x509.CertificateSigningRequest, device: str, cohort: str, key: str | None = None
    ) -> pb.EnrollResponse:
        certificate, peer, expires = self._authority.issue_device(csr, device, self._days)
        self._store.put_device(device, cohort, peer.serial, expires, key)
        return pb.EnrollResponse(
            device_id=device,
            certificate_pem=certificate,
            ca_pem=self._authority.pem,
            release_keys=self._release_keys,
            cohort=cohort,
        )

    def admit(self, peer: Peer) -> DeviceRecord:
        """The enrolled device behind a certificate, at the beginning of a call.

        Raises:
            AccessError: it is unknown here, or was revoked.
            QuotaError: it calls too often.
        """
        device = self.known(peer)
        delay = self._calls.take(peer.id, 1.0)
        if delay:
            raise QuotaError(f"Device {peer.id} calls too often.", max(1, int(delay * 1000)))
        return device

    def known(self, peer: Peer) -> DeviceRecord:
        """The same without counting a call. Raises AccessError."""
        device = self._store.device(peer.id)
        if device is None:
            raise AccessError(f"Device {peer.id} is not enrolled in this fleet: enrol again.", code="unknown-device")
        if device.revoked_ms:
            raise AccessError(f"Device {peer.id} was revoked: its operator can enrol it under a new key.", code="revoked")
        return device

    def heartbeat(self, device: DeviceRecord, request: pb.HeartbeatRequest) -> None:
        """Records a device's health; a snapshot is trimmed rather than refused, so that a sick device is still heard."""
        finite = ((k, float(v)) for k, v in sorted(request.metrics.items())[:METRICS] if math.isfinite(v))
        metrics = {printable(k, 64): v for k, v in finite}
        self._store.saw_device(
            device.id,
            bundle_digest=printable(request.bundle_digest, 64),
            release_version=min(request.release_version, 2**62),
            state=printable(request.state, 64),
            domain=printable(request.domain, 64),
            metrics=metrics,
            last_error=printable(request.last_error, TEXT),
        )
