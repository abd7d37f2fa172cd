"""A lease: until when one release may be installed. Renewing it leaves the release, its version and its digest as they are.

    Lease ──► seal ──► SignedLease        cloud, for each answer that names a release
    open_lease ◄── SignedLease            device, beside the release

A release carries its own expiry, set when it was published; a lease can only extend it. Whoever can order releases but cannot
sign (a stolen TLS key) can therefore order nothing that the signer stopped renewing, once the last expiry has passed: the
purpose of what Uptane's Director repository signs (https://uptane.github.io, "Uptane Standard").
"""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from refold.errors import ReleaseError
from refold.limits import LIMITS
from refold.signing import KeyRing, SigningKey
from refold.v1 import norms_pb2 as pb

__all__ = ["FORMAT", "Lease", "open_lease", "seal_lease"]

FORMAT = 1001  # no release's format: signed bytes of one kind are refused as the other
LARGEST = 4096  # bytes; a lease has about 200


@dataclass(frozen=True)
class Lease:
    """Times are Unix milliseconds by the signer's clock. `release_digest`: SHA-256 of the release's payload, in hex."""

    bundle_digest: str
    cohort: str
    version: int
    release_digest: str
    issued_unix_ms: int
    expires_unix_ms: int


def seal_lease(lease: Lease, *keys: SigningKey) -> pb.SignedLease:
    message = pb.Lease(
        format=FORMAT,
        bundle_digest=lease.bundle_digest,
        cohort=lease.cohort,
        version=lease.version,
        release_digest=lease.release_digest,
        issued_unix_ms=lease.issued_unix_ms,
        expires_unix_ms=lease.expires_unix_ms,
    )
    payload = message.SerializeToString(deterministic=True)
    return pb.SignedLease(payload=payload, signatures=[key.sign(payload) for key in keys])


def open_lease(signed: pb.SignedLease, ring: KeyRing) -> Lease:
    """Verifies before decoding.

    Raises:
        SignatureError: not signed by enough trusted keys, or changed on its way.
        ReleaseError: too large, damaged, or no lease.
    """
    if len(signed.payload) > LARGEST or len(signed.signatures) > LIMITS.signatures:
        raise ReleaseError("The release's lease is larger than any real one: refused unread.", code="lease")
    ring.verify(signed.payload, signed.signatures)
    try:
        message = pb.Lease.FromString(signed.payload)
    except DecodeError as e:
        raise ReleaseError("The release's lease cannot be decoded: it was damaged on its way.", code="lease") from e
    if message.format != FORMAT:
        raise ReleaseError(f"The release's lease has format {message.format}, this program reads {FORMAT}.", code="lease")
    return Lease(
        message.bundle_digest,
        message.cohort,
        message.version,
        message.release_digest,
        message.issued_unix_ms,
        message.expires_unix_ms,
    )
