"""A release: the few kilobytes that change a model's behaviour, for one bundle and one cohort.

    encode ──► payload bytes ──► sign ──► SignedRelease      cloud
    decode ◄── verify ◄── size limit ◄── SignedRelease       device; then admit() against the bundle it runs

The digest of a release is the SHA-256 of its payload bytes; so is its identity on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from refold.codec import activation_from_pb, activation_to_pb, states_from_pb, states_to_pb
from refold.errors import NormStateError, ReleaseError
from refold.limits import LIMITS
from refold.norms import ActivationScale, NormState, NormTable
from refold.signing import KeyRing, SigningKey
from refold.v1 import norms_pb2 as pb

__all__ = ["FORMAT", "Release", "admit", "decode", "encode", "open_signed", "seal"]

FORMAT = 1


@dataclass(frozen=True)
class Release:
    """Values of a release; see `refold.v1.Release` for units."""

    bundle_digest: str
    cohort: str
    version: int
    states: Mapping[str, NormState]
    parent_version: int = 0
    created_unix_ms: int = 0
    expires_unix_ms: int = 0
    domain: str = ""
    activations: tuple[ActivationScale, ...] = ()
    samples: int = 0
    statistics_frames: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def encode(release: Release) -> bytes:
    """Deterministic for the same values with the same protobuf version; what comes out is what gets signed."""
    message = pb.Release(
        format=FORMAT,
        bundle_digest=release.bundle_digest,
        cohort=release.cohort,
        version=release.version,
        parent_version=release.parent_version,
        created_unix_ms=release.created_unix_ms,
        expires_unix_ms=release.expires_unix_ms,
        domain=release.domain,
        states=states_to_pb(release.states),
        activations=[activation_to_pb(a) for a in release.activations],
        evidence=pb.ReleaseEvidence(
            samples=release.samples, statistics_frames=release.statistics_frames, metrics=dict(release.metrics)
        ),
        note=release.note,
    )
    payload = message.SerializeToString(deterministic=True)
    if len(payload) > LIMITS.release_bytes:
        raise ReleaseError(
            f"The release has {len(payload)} bytes; the limit is {LIMITS.release_bytes}.", code="release-too-large"
        )
    return payload


def decode(payload: bytes) -> Release:
    """Raises ReleaseError when the bytes are too many, damaged or of a newer format."""
    if len(payload) > LIMITS.release_bytes:
        raise ReleaseError(
            f"The release has {len(payload)} bytes; the limit is {LIMITS.release_bytes}.", code="release-too-large"
        )
    try:
        message = pb.Release.FromString(payload)
    except DecodeError as e:
        raise ReleaseError("The release cannot be decoded: it was damaged on its way.", code="damaged") from e
    if message.format != FORMAT:
        raise ReleaseError(
            f"The release has format {message.format}, this program reads format {FORMAT}: update it.", code="format"
        )
    try:
        states = states_from_pb(message.states)
    except NormStateError as e:
        raise ReleaseError(f"The release is refused: {e.message}", code="damaged") from e
    return Release(
        bundle_digest=message.bundle_digest,
        cohort=message.cohort,
        version=message.version,
        parent_version=message.parent_version,
        created_unix_ms=message.created_unix_ms,
        expires_unix_ms=message.expires_unix_ms,
        domain=message.domain,
        states=states,
        activations=tuple(activation_from_pb(a) for a in message.activations),
        samples=message.evidence.samples,
        statistics_frames=message.evidence.statistics_frames,
        metrics=dict(message.evidence.metrics),
        note=message.note,
    )


def digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def seal(release: Release, *keys: SigningKey) -> pb.SignedRelease:
    payload = encode(release)
    return pb.SignedRelease(payload=payload, signatures=[key.sign(payload) for key in keys])


def open_signed(signed: pb.SignedRelease, ring: KeyRing) -> Release:
    """Verifies before decoding: bytes nobody trusted signed are never parsed.

    Raises:
        SignatureError: not signed by enough trusted keys.
        ReleaseError: too large, damaged or too new.
    """
    if len(signed.payload) > LIMITS.release_bytes or len(signed.signatures) > LIMITS.signatures:
        raise ReleaseError("The release is larger than any real one: refused unread.", code="release-too-large")
    ring.verify(signed.payload, signed.signatures)
    return decode(signed.payload)


def admit(release: Release, table: NormTable, *, bundle_digest: str, cohort: str, now_unix_ms: int) -> None:
    """Admits a verified release to the bundle a device runs, or says why not.

    Raises:
        ReleaseError: for another bundle or cohort, or expired.
        NormStateError: a state is not admissible (see `refold.norms.check_state`), or a bias would overflow.
    """
    if release.bundle_digest != bundle_digest:
        raise ReleaseError(
            f"The release is for bundle {release.bundle_digest[:12]}, this device runs {bundle_digest[:12]}.",
            code="wrong-bundle",
        )
    if release.cohort != cohort:
        raise ReleaseError(
            f"The release is for cohort {release.cohort!r}, this device belongs to {cohort!r}.", code="wrong-cohort"
        )
    if release.version < 1:
        raise ReleaseError("The release has no version: versions start at 1.", code="version")
    if release.expires_unix_ms and now_unix_ms > release.expires_unix_ms:
        raise ReleaseError(f"Release {release.version} has expired: ask the cloud for a newer one.", code="expired")
    table.check(release.states)
    table.tensors(release.states, release.activations)
