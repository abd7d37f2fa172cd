"""Rows as values. Times are Unix milliseconds; 0 is never."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = [
    "BundleRecord",
    "CohortRecord",
    "Decision",
    "DeviceRecord",
    "OperatorRecord",
    "ReleaseRecord",
    "SampleRecord",
    "StatisticsRecord",
]


@dataclass(frozen=True)
class BundleRecord:
    """A model the service adapts. `object`: digest of the .refold file; `teachers`: (spec, weights) each."""

    digest: str
    name: str
    object: str
    preprocess_digest: str
    width: int
    height: int
    teachers: tuple[tuple[str, str], ...] = ()
    added_ms: int = 0


@dataclass(frozen=True)
class DeviceRecord:
    """A device. `key_digest`: SHA-256 of the key it enrolled with, "" before 2026-11-29; `frames`: reported so far."""

    id: str
    cohort: str
    serial: str
    expires_ms: int
    enrolled_ms: int = 0
    revoked_ms: int = 0
    last_seen_ms: int = 0
    bundle_digest: str = ""
    release_version: int = 0
    state: str = ""
    domain: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    last_error: str = ""
    key_digest: str = ""
    frames: int = 0


@dataclass(frozen=True)
class OperatorRecord:
    """One certificate of an operator. `serial` in hex; `role`: what it may do, "operator" is everything."""

    serial: str
    name: str
    role: str
    issued_ms: int
    expires_ms: int
    revoked_ms: int = 0


@dataclass(frozen=True)
class SampleRecord:
    """A stored upload; `id` grows in the order of storing. `header`: the serialised SampleHeader."""

    digest: str
    bundle_digest: str
    cohort: str
    device: str
    domain: str
    header: bytes
    size: int
    held_back: bool
    received_ms: int
    id: int = 0


@dataclass(frozen=True)
class StatisticsRecord:
    """A stored report; `id` grows in the order of storing. `payload`: the serialised StatisticsReport."""

    digest: str
    bundle_digest: str
    cohort: str
    device: str
    domain: str
    release_version: int
    frames: int
    payload: bytes
    received_ms: int
    id: int = 0


@dataclass(frozen=True)
class Decision:
    """What became of one candidate, as it is stored in one transaction.

    Attributes:
        payload: the encoded release, empty when refused.
        samples_upto, statistics_upto: newest rows the candidate's training saw: a restarted worker begins after them.
    """

    bundle_digest: str
    cohort: str
    domain: str
    state: str
    reason: str
    created_ms: int
    parent_version: int = 0
    version: int = 0
    digest: str = ""
    signed: bytes = b""
    samples: int = 0
    statistics_frames: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples_upto: int = 0
    statistics_upto: int = 0


@dataclass(frozen=True)
class ReleaseRecord(Decision):
    """A stored decision. `state`: "released", "rolled-back" or "refused"; a refused one has version 0."""

    id: int = 0
    size: int = 0


@dataclass(frozen=True)
class CohortRecord:
    """One (bundle, cohort): its counters and its pointer. `current_version` 0: as exported."""

    bundle_digest: str
    cohort: str
    current_version: int = 0
    last_version: int = 0
    samples: int = 0
    sample_bytes: int = 0
    statistics_reports: int = 0
    last_gate: str = ""
