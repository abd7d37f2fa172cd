"""Ed25519 over exact bytes. What is signed is what was serialised: nothing is re-encoded to be verified."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from refold.atomic import write_new
from refold.errors import SignatureError, UsageError
from refold.v1 import norms_pb2 as pb

__all__ = ["KeyRing", "SigningKey", "key_id"]


def key_id(public: bytes) -> str:
    """First 16 hex digits of the SHA-256 of a raw 32-byte public key."""
    return hashlib.sha256(public).hexdigest()[:16]


class SigningKey:
    """A private key; made once, kept in a file only its owner can read."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = private.public_key().public_bytes_raw()
        self.key_id = key_id(self.public)

    @classmethod
    def generate(cls) -> SigningKey:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Raises UsageError when the file is not an unencrypted Ed25519 PEM key."""
        try:
            private = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except OSError as e:
            raise UsageError(f"The signing key {path} cannot be read: {e.strerror or e}.") from e
        except (ValueError, TypeError) as e:
            raise UsageError(f"{path} is not a signing key made by Refold (unencrypted Ed25519 PEM).") from e
        if not isinstance(private, Ed25519PrivateKey):
            raise UsageError(f"{path} holds another kind of key; releases are signed with Ed25519.")
        return cls(private)

    def save(self, path: Path) -> None:
        """Writes the key, readable by its owner only; never overwrites an existing one.

        Raises:
            UsageError: the file exists.
            StorageError: it cannot be written; no half of a key is left.
        """
        pem = self._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            write_new(path, pem, mode=0o600)
        except FileExistsError:
            raise UsageError(f"{path} exists; a signing key is never overwritten. Move it away first.") from None

    def sign(self, payload: bytes) -> pb.Signature:
        return pb.Signature(key_id=self.key_id, ed25519=self._private.sign(payload))


class KeyRing:
    """The public keys a device trusts, and how many of them must agree."""

    def __init__(self, public_keys: Iterable[bytes], threshold: int = 1) -> None:
        keys = [bytes(k) for k in public_keys]
        if any(len(k) != 32 for k in keys):
            raise UsageError("A release key is 32 raw bytes (64 hex digits); one of the configured keys is not.")
        self._keys = {key_id(k): Ed25519PublicKey.from_public_bytes(k) for k in keys}
        if not 1 <= threshold <= max(len(self._keys), 1):
            raise UsageError(f"A threshold of {threshold} cannot be met by {len(self._keys)} release keys.")
        self.threshold = threshold

    def __len__(self) -> int:
        return len(self._keys)

    def verify(self, payload: bytes, signatures: Sequence[pb.Signature]) -> None:
        """Passes when `threshold` distinct trusted keys signed exactly these bytes.

        Raises:
            SignatureError: too few did, or a signature claims a trusted key and does not verify.
        """
        good: set[str] = set()
        for signature in signatures:
            public = self._keys.get(signature.key_id)
            if public is None:
                continue
            try:
                public.verify(signature.ed25519, payload)
            except InvalidSignature:
                raise SignatureError(
                    f"The signature by key {signature.key_id} does not match: the content was changed on its way.",
                    code="bad-signature",
                ) from None
            good.add(signature.key_id)
        if len(good) < self.threshold:
            raise SignatureError(
                f"{len(good)} trusted signature(s) where {self.threshold} are needed: nobody this device trusts signed it.",
                code="unsigned",
            )
