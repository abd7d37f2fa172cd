"""Who is who: the fleet's certificate authority, and the identity and role that a peer's certificate proves.

The role is in the certificate (a URI among its alternative names) and the id is its common name; nothing in a request's body
says who asks (docs/adr/003-identity-and-enrolment.md).
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from refold.atomic import write_atomically, write_new
from refold.errors import AccessError, UsageError

__all__ = ["Authority", "Peer", "peer_of", "read_request", "write_private"]

ROLE = "refold://role/"
SKEW = datetime.timedelta(minutes=10)  # clocks of devices without a battery are a little off
LONG = datetime.timedelta(days=3650)
CSR_BYTES = 16 * 1024


@dataclass(frozen=True)
class Peer:
    """What a certificate says: id (common name), role ("device" or "operator"), serial number in hex, and its end (Unix ms)."""

    id: str
    role: str
    serial: str
    expires_ms: int = 0


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


class Authority:
    """The certificate authority of one fleet: EC P-256, its key in a file only its owner can read."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate, self._key = certificate, key
        self.pem = certificate.public_bytes(serialization.Encoding.PEM)

    @classmethod
    def make(cls, name: str) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
            data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_now() - SKEW)
            .not_valid_after(_now() + LONG)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    @classmethod
    def load(cls, certificate: Path, key: Path) -> Authority:
        """Raises UsageError when a file is missing, damaged, or the two do not belong together."""
        try:
            loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
            private = serialization.load_pem_private_key(key.read_bytes(), password=None)
        except OSError as e:
            raise UsageError(f"{e.filename} cannot be read: {e.strerror}. `refold cloud init` makes it.") from e
        except (ValueError, TypeError) as e:
            raise UsageError(f"{certificate} and {key} are not a certificate and its unencrypted key (PEM).") from e
        if not isinstance(private, ec.EllipticCurvePrivateKey) or private.public_key() != loaded.public_key():
            raise UsageError(f"{key} is not the key of {certificate}.")
        return cls(loaded, private)

    def save(self, certificate: Path, key: Path) -> None:
        write_private(key, _key_pem(self._key))
        write_atomically(certificate, [self.pem])

    def _sign(
        self, name: str, public: ec.EllipticCurvePublicKey, days: float, names: list[x509.GeneralName], *, server: bool
    ) -> x509.Certificate:
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self._certificate.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(_now() - SKEW)
            .not_valid_after(min(_now() + datetime.timedelta(days=days), self._certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def issue_server(self, hosts: Iterable[str]) -> tuple[bytes, bytes]:
        """(certificate, key) in PEM for the given names and addresses."""
        names: list[x509.GeneralName] = []
        for host in hosts:
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                names.append(x509.DNSName(host))
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign("refold-cloud", key.public_key(), LONG.days, names, server=True)
        return certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key)

    def issue_operator(self, name: str, days: float = 365) -> tuple[bytes, bytes]:
        """(certificate, key) in PEM that may call Admin."""
        key = ec.generate_private_key(ec.SECP256R1())
        role = x509.UniformResourceIdentifier(f"{ROLE}operator")
        certificate = self._sign(name, key.public_key(), days, [role], server=False)
        return certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key)

    def issue_device(self, request: x509.CertificateSigningRequest, device_id: str, days: float) -> tuple[bytes, Peer, int]:
        """Signs a checked request (`read_request`).

        Of the request only the key is used: name, role and lifetime are the authority's to give.

        Returns:
            (certificate PEM, what it proves, expiry in Unix milliseconds)
        """
        public = request.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        certificate = self._sign(device_id, public, days, [x509.UniformResourceIdentifier(f"{ROLE}device")], server=False)
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        peer = peer_of(pem)
        return pem, peer, peer.expires_ms


def read_request(pem: bytes) -> x509.CertificateSigningRequest:
    """A certificate signing request whose sender holds its key.

    Raises:
        AccessError: not a request, signed by another key, or not EC P-256.
    """
    wanted = "Enrol with a PEM certificate request over an EC P-256 key."
    if len(pem) > CSR_BYTES:
        raise AccessError(f"The certificate request has {len(pem)} bytes. {wanted}", code="bad-request")
    try:
        request = x509.load_pem_x509_csr(pem)
        public = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, TypeError, InvalidSignature, NotImplementedError) as e:
        raise AccessError(f"The certificate request cannot be read. {wanted}", code="bad-request", detail=str(e)) from e
    if not valid:
        raise AccessError(f"The certificate request is not signed by its own key. {wanted}", code="bad-request")
    if isinstance(public, rsa.RSAPublicKey) or not isinstance(public, ec.EllipticCurvePublicKey):
        raise AccessError(f"The certificate request is over another kind of key. {wanted}", code="bad-request")
    if not isinstance(public.curve, ec.SECP256R1):
        raise AccessError(f"The certificate request is over the curve {public.curve.name}. {wanted}", code="bad-request")
    return request


@lru_cache(maxsize=4096)
def peer_of(pem: bytes) -> Peer:
    """Raises AccessError when the certificate carries no Refold role."""
    certificate = x509.load_pem_x509_certificate(pem)
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        roles = [u.removeprefix(ROLE) for u in names.get_values_for_type(x509.UniformResourceIdentifier) if u.startswith(ROLE)]
    except x509.ExtensionNotFound:
        roles = []
    if not common or len(roles) != 1 or roles[0] not in ("device", "operator"):
        raise AccessError("This certificate is neither a device's nor an operator's: enrol first.", code="no-role")
    expires_ms = int(certificate.not_valid_after_utc.timestamp() * 1000)
    return Peer(str(common[0].value), roles[0], f"{certificate.serial_number:x}", expires_ms)


def write_private(path: Path, content: bytes) -> None:
    """Writes a private key, readable by its owner only; never overwrites one.

    Raises:
        UsageError: the file exists.
        StorageError: it cannot be written; no half of a key is left.
    """
    try:
        write_new(path, content, mode=0o600)
    except FileExistsError:
        raise UsageError(f"{path} exists; a private key is never overwritten. Move it away first.") from None
