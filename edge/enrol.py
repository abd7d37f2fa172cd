"""How a device becomes a member: a one-time join token and a certificate request buy a certificate (ADR 003).

    identity = enrol(EnrolSettings(address="cloud:7444", ca=Path("ca.pem")), token, directory)
    identity = Identity.load(directory)
    identity = renew(identity, link_settings, directory)         over mutual TLS, no token; after two thirds of its life

    <directory>/identity.json   0600   certificate, private key, CA, release keys, id, cohort: one file, old or new, never mixed
    <directory>/pending.json    0600   key and request of an enrolment without an answer yet: a second try repeats it exactly

The private key is made here and never leaves. The token is sent only to a server whose certificate is under the given CA or has
the given fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from edge.channel import error_of, open_channel
from edge.link_settings import EnrolSettings, LinkSettings
from refold.atomic import discard, make_directory, write_atomically
from refold.errors import AccessError, NetworkError, StorageError, UsageError
from refold.network import meaning_of, parse_address
from refold.network.address import ENROL_PORT
from refold.signing import KeyRing
from refold.v1 import fleet_pb2, fleet_pb2_grpc

__all__ = ["Identity", "enrol", "renew"]

IDENTITY, PENDING = "identity.json", "pending.json"
TIMEOUT_S = 30.0
RENEW_AFTER = 2 / 3  # of a certificate's life: a month is left to be offline in when it lasts three


@dataclass(frozen=True)
class Identity:
    """Who a device is, and whom it believes. PEM bytes; `release_keys` are raw 32-byte Ed25519 public keys."""

    device_id: str
    cohort: str
    certificate_pem: bytes
    key_pem: bytes = field(repr=False)
    ca_pem: bytes
    release_keys: tuple[bytes, ...]

    @property
    def ring(self) -> KeyRing:
        """The keys that releases must be signed with."""
        return KeyRing(self.release_keys)

    def life(self) -> tuple[float, float]:
        """(not before, not after) of the certificate, Unix seconds."""
        certificate = x509.load_pem_x509_certificate(self.certificate_pem)
        return certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()

    def is_due(self, now: float) -> bool:
        """True when the certificate should be renewed."""
        begin, end = self.life()
        return now > begin + RENEW_AFTER * (end - begin)

    def save(self, directory: Path) -> None:
        """Writes identity.json in one step, readable by its owner only. Raises StorageError."""
        values = {
            "device_id": self.device_id,
            "cohort": self.cohort,
            "certificate": self.certificate_pem.decode(),
            "key": self.key_pem.decode(),
            "ca": self.ca_pem.decode(),
            "release_keys": [k.hex() for k in self.release_keys],
        }
        _write(directory, IDENTITY, values)

    @classmethod
    def load(cls, directory: Path) -> Identity:
        """Raises UsageError when the device is not enrolled, or the file is damaged."""
        path = directory / IDENTITY
        if path.exists() and not path.is_file():  # a named pipe would be waited for
            raise UsageError(f"{path} is no regular file: remove it and enrol the device again.", code="identity")
        try:
            values = json.loads(path.read_bytes())
            identity = cls(
                device_id=str(values["device_id"]),
                cohort=str(values["cohort"]),
                certificate_pem=values["certificate"].encode(),
                key_pem=values["key"].encode(),
                ca_pem=values["ca"].encode(),
                release_keys=tuple(bytes.fromhex(k) for k in values["release_keys"]),
            )
            identity.life()
        except FileNotFoundError:
            raise UsageError(
                f"This device is not enrolled: there is no {path}. Run `refold edge enrol` with a join token.",
                code="not-enrolled",
            ) from None
        except OSError as e:
            raise UsageError(f"{path} cannot be read: {e.strerror or e}.") from e
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UsageError(f"{path} is damaged: enrol the device again.", code="damaged") from e
        return identity


def enrol(settings: EnrolSettings, token: str, directory: Path) -> Identity:
    """Buys an identity and saves it; an earlier one is replaced in one step. A try whose answer was lost may be repeated.

    Raises:
        UsageError: no address, neither CA nor fingerprint, or an unreadable CA file.
        AccessError: the token is unknown, used or expired; or the server is not the one expected.
        NetworkError: the cloud cannot be reached.
        StorageError: the identity cannot be written.
    """
    if not settings.address or not token.strip():
        raise UsageError("Enrolling needs the address of the cloud's enrolment port and a join token (`refold cloud token`).")
    trusted = _trusted(settings)
    key_pem, request_pem = _pending(directory, settings.name or socket.gethostname())
    channel = open_channel(settings.address, trusted, server_name=settings.server_name)
    request = fleet_pb2.EnrollRequest(join_token=token, csr_pem=request_pem, cohort=settings.cohort)
    identity = _ask(channel, settings.address, request, key_pem)
    identity.save(directory)
    discard(directory / PENDING)
    return identity


def renew(identity: Identity, settings: LinkSettings, directory: Path) -> Identity:
    """A new certificate over a new key, asked for with the old one instead of a token. Raises as `enrol`."""
    key_pem, request_pem = _pending(directory, identity.device_id)
    channel = open_channel(
        settings.address,
        identity.ca_pem,
        key_pem=identity.key_pem,
        certificate_pem=identity.certificate_pem,
        server_name=settings.server_name,
    )
    request = fleet_pb2.EnrollRequest(csr_pem=request_pem, cohort=identity.cohort)
    renewed = _ask(channel, settings.address, request, key_pem)
    renewed.save(directory)
    discard(directory / PENDING)
    return renewed


def _ask(channel: grpc.Channel, address: str, request: fleet_pb2.EnrollRequest, key_pem: bytes) -> Identity:
    try:
        stub = fleet_pb2_grpc.FleetStub(channel)  # type: ignore[no-untyped-call]
        answer = stub.Enroll(request, timeout=TIMEOUT_S)
    except grpc.RpcError as e:
        raise error_of(e, address) from e
    finally:
        channel.close()
    identity = Identity(
        device_id=answer.device_id,
        cohort=answer.cohort,
        certificate_pem=answer.certificate_pem,
        key_pem=key_pem,
        ca_pem=answer.ca_pem,
        release_keys=tuple(answer.release_keys),
    )
    _check(identity)
    return identity


def _check(identity: Identity) -> None:
    """What the cloud sent must fit the key that was made here, and name somebody to believe."""
    try:
        certificate = x509.load_pem_x509_certificate(identity.certificate_pem)
        x509.load_pem_x509_certificate(identity.ca_pem)
        private = serialization.load_pem_private_key(identity.key_pem, password=None)
    except ValueError as e:
        raise AccessError("The cloud answered with a damaged certificate: try again.", code="damaged") from e
    if certificate.public_key() != private.public_key():
        raise AccessError("The cloud answered with a certificate for another key: try again.", code="damaged")
    if not identity.release_keys:
        raise AccessError("The cloud named no release key: this device could never trust a release.", code="no-release-key")
    try:
        _ = identity.ring
    except UsageError as e:
        raise AccessError(f"The cloud sent a release key that is none: {e.message}", code="damaged") from e


def _pending(directory: Path, wish: str) -> tuple[bytes, bytes]:
    """(key, request) in PEM: the ones of an enrolment that was cut off, or new ones, on disk before they are used.

    Args:
        wish: a name for the device; the cloud makes an id of it and the key.
    """
    try:
        values = json.loads((directory / PENDING).read_bytes())
        return values["key"].encode(), values["request"].encode()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, wish[:64] or "device")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    key_pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    request_pem = request.public_bytes(serialization.Encoding.PEM)
    _write(directory, PENDING, {"key": key_pem.decode(), "request": request_pem.decode()})
    return key_pem, request_pem


def _write(directory: Path, name: str, values: Mapping[str, object]) -> None:
    try:
        make_directory(directory, mode=0o700)
    except OSError as e:
        raise StorageError(f"{directory} cannot be made: {e.strerror or e}.") from e
    write_atomically(directory / name, [json.dumps(values, indent=1).encode()], mode=0o600)


def _trusted(settings: EnrolSettings) -> bytes:
    """The PEM certificate that the enrolment server must be, or be under. With CA and fingerprint both must fit."""
    pem = _authority(settings.ca) if settings.ca is not None else None
    wanted = settings.fingerprint.replace(":", "").lower()
    if pem is not None and not wanted:
        return pem
    if not wanted:
        raise UsageError(
            "Enrolling sends a secret, so the cloud must be known first: give its CA file, or its certificate's fingerprint."
        )
    if len(wanted) != 64 or set(wanted) - set("0123456789abcdef"):
        raise UsageError("A fingerprint is a SHA-256: 64 hex digits, with or without colons.")
    if pem is not None and x509.load_pem_x509_certificate(pem).fingerprint(hashes.SHA256()).hex() == wanted:
        return pem
    for der in _presented(settings.address):
        if hashlib.sha256(der).hexdigest() == wanted:
            return pem or ssl.DER_cert_to_PEM_cert(der).encode()
    raise AccessError(
        f"The server at {settings.address} shows another certificate than the fingerprint names: the token was not sent.",
        code="wrong-server",
    )


def _authority(path: Path) -> bytes:
    try:
        pem = path.read_bytes()
        x509.load_pem_x509_certificate(pem)
    except OSError as e:
        raise UsageError(f"The CA file {path} cannot be read: {e.strerror or e}.") from e
    except ValueError as e:
        raise UsageError(f"{path} is not a PEM certificate.") from e
    return pem


def _presented(address: str) -> list[bytes]:
    """The certificates a server shows (DER), unverified: its own, and from Python 3.13 on those it sends along."""
    try:
        where = parse_address(address, ENROL_PORT)
    except ValueError as e:
        raise UsageError(f"The address {address!r} cannot be used: {e}.", code="address") from e
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((where.host, where.port), TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=where.host) as secure,
        ):
            own = secure.getpeercert(binary_form=True) or b""
            chain = getattr(secure, "get_unverified_chain", None)
            return [own, *chain()] if chain else [own]
    except (OSError, ValueError) as e:
        meaning = meaning_of(str(e))
        raise NetworkError(f"The cloud at {address} cannot be reached: {e}. {meaning}".strip(), code="unavailable") from e
