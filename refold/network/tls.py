"""TLS files in pairs, checked when they are read: gRPC itself starts with a bad pair and then refuses every caller."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from pydantic import AfterValidator

from refold.configuration.schema import NotEmpty
from refold.errors import UsageError

__all__ = ["Fingerprint", "GivenFile", "GivenText", "Pair", "PublicKey", "load_authority", "load_pair"]


def _hex_digits(text: str, what: str) -> str:
    digits = text.replace(":", "").strip().lower()
    if len(digits) != 64 or set(digits) - set("0123456789abcdef"):
        raise ValueError(f"{what} is 64 hex digits")
    return digits


GivenText = Annotated[str, NotEmpty()]
GivenFile = Annotated[Path, NotEmpty()]
Fingerprint = Annotated[
    str,
    NotEmpty(),
    AfterValidator(lambda text: text and _hex_digits(text, "a fingerprint is a SHA-256, with or without colons: it")),
]
PublicKey = Annotated[str, AfterValidator(lambda text: _hex_digits(text, "a public key"))]


@dataclass(frozen=True)
class Pair:
    """A certificate (with the chain that follows it in its file) and its private key, PEM."""

    certificate_pem: bytes
    key_pem: bytes
    certificate: x509.Certificate

    def expired(self, now: datetime.datetime | None = None) -> bool:
        return self.certificate.not_valid_after_utc < (now or datetime.datetime.now(datetime.timezone.utc))


def _read(path: Path, hint: str = "") -> bytes:
    try:
        content = path.read_bytes()
    except OSError as e:
        raise UsageError(f"The TLS file {path} cannot be read: {e.strerror or e}.{hint}", code="certificate") from e
    if not content.strip():
        raise UsageError(f"The TLS file {path} is empty.{hint}", code="certificate")
    return content


def load_pair(certificate: Path, key: Path, hint: str = "") -> Pair:
    """A certificate and the key that belongs to it.

    Args:
        hint: a sentence with a space before it that says how such files are made.

    Raises:
        UsageError: a file is missing, empty or no PEM, the key is encrypted, or it is another certificate's.
    """
    pem, key_pem = _read(certificate, hint), _read(key, hint)
    try:
        loaded = x509.load_pem_x509_certificate(pem)
        private = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as e:
        raise UsageError(
            f"{certificate} and {key} are not a certificate and its unencrypted key (PEM).{hint}", code="certificate"
        ) from e
    if private.public_key() != loaded.public_key():
        raise UsageError(f"{key} is not the key of {certificate}.{hint}", code="certificate")
    return Pair(pem, key_pem, loaded)


def load_authority(path: Path) -> bytes:
    """The PEM certificates of one file, under which peers must be. Raises UsageError when it holds none."""
    pem = _read(path)
    try:
        x509.load_pem_x509_certificates(pem)
    except ValueError as e:
        raise UsageError(f"{path} holds no certificate (PEM).", code="certificate") from e
    return pem
