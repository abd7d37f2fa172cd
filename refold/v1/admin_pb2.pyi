from refold.v1 import norms_pb2 as _norms_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeviceStatus(_message.Message):
    __slots__ = ("device_id", "cohort", "bundle_digest", "release_version", "last_seen_unix_ms", "domain", "metrics", "last_error")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RELEASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    cohort: str
    bundle_digest: str
    release_version: int
    last_seen_unix_ms: int
    domain: str
    metrics: _containers.ScalarMap[str, float]
    last_error: str
    def __init__(self, device_id: _Optional[str] = ..., cohort: _Optional[str] = ..., bundle_digest: _Optional[str] = ..., release_version: _Optional[int] = ..., last_seen_unix_ms: _Optional[int] = ..., domain: _Optional[str] = ..., metrics: _Optional[_Mapping[str, float]] = ..., last_error: _Optional[str] = ...) -> None: ...

class EvidenceStatus(_message.Message):
    __slots__ = ("domain", "samples", "samples_wanted", "held_out", "held_out_wanted", "undecided")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_WANTED_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_WANTED_FIELD_NUMBER: _ClassVar[int]
    UNDECIDED_FIELD_NUMBER: _ClassVar[int]
    domain: str
    samples: int
    samples_wanted: int
    held_out: int
    held_out_wanted: int
    undecided: bool
    def __init__(self, domain: _Optional[str] = ..., samples: _Optional[int] = ..., samples_wanted: _Optional[int] = ..., held_out: _Optional[int] = ..., held_out_wanted: _Optional[int] = ..., undecided: _Optional[bool] = ...) -> None: ...

class CohortStatus(_message.Message):
    __slots__ = ("bundle_digest", "bundle_name", "cohort", "current_version", "samples", "sample_bytes", "statistics_reports", "distiller", "last_gate", "evidence")
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_NAME_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    CURRENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATISTICS_REPORTS_FIELD_NUMBER: _ClassVar[int]
    DISTILLER_FIELD_NUMBER: _ClassVar[int]
    LAST_GATE_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    bundle_digest: str
    bundle_name: str
    cohort: str
    current_version: int
    samples: int
    sample_bytes: int
    statistics_reports: int
    distiller: str
    last_gate: str
    evidence: _containers.RepeatedCompositeFieldContainer[EvidenceStatus]
    def __init__(self, bundle_digest: _Optional[str] = ..., bundle_name: _Optional[str] = ..., cohort: _Optional[str] = ..., current_version: _Optional[int] = ..., samples: _Optional[int] = ..., sample_bytes: _Optional[int] = ..., statistics_reports: _Optional[int] = ..., distiller: _Optional[str] = ..., last_gate: _Optional[str] = ..., evidence: _Optional[_Iterable[_Union[EvidenceStatus, _Mapping]]] = ...) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("devices", "cohorts", "version", "warnings")
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    COHORTS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[DeviceStatus]
    cohorts: _containers.RepeatedCompositeFieldContainer[CohortStatus]
    version: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, devices: _Optional[_Iterable[_Union[DeviceStatus, _Mapping]]] = ..., cohorts: _Optional[_Iterable[_Union[CohortStatus, _Mapping]]] = ..., version: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class ListReleasesRequest(_message.Message):
    __slots__ = ("bundle_digest", "cohort")
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    bundle_digest: str
    cohort: str
    def __init__(self, bundle_digest: _Optional[str] = ..., cohort: _Optional[str] = ...) -> None: ...

class ReleaseRow(_message.Message):
    __slots__ = ("version", "parent_version", "created_unix_ms", "bundle_digest", "cohort", "domain", "bytes", "digest", "state", "reason", "evidence", "expires_unix_ms")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    version: int
    parent_version: int
    created_unix_ms: int
    bundle_digest: str
    cohort: str
    domain: str
    bytes: int
    digest: str
    state: str
    reason: str
    evidence: _norms_pb2.ReleaseEvidence
    expires_unix_ms: int
    def __init__(self, version: _Optional[int] = ..., parent_version: _Optional[int] = ..., created_unix_ms: _Optional[int] = ..., bundle_digest: _Optional[str] = ..., cohort: _Optional[str] = ..., domain: _Optional[str] = ..., bytes: _Optional[int] = ..., digest: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., evidence: _Optional[_Union[_norms_pb2.ReleaseEvidence, _Mapping]] = ..., expires_unix_ms: _Optional[int] = ...) -> None: ...

class ListReleasesResponse(_message.Message):
    __slots__ = ("releases",)
    RELEASES_FIELD_NUMBER: _ClassVar[int]
    releases: _containers.RepeatedCompositeFieldContainer[ReleaseRow]
    def __init__(self, releases: _Optional[_Iterable[_Union[ReleaseRow, _Mapping]]] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("bundle_digest", "cohort", "to_version", "reason")
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    TO_VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    bundle_digest: str
    cohort: str
    to_version: int
    reason: str
    def __init__(self, bundle_digest: _Optional[str] = ..., cohort: _Optional[str] = ..., to_version: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class RollbackResponse(_message.Message):
    __slots__ = ("current_version",)
    CURRENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    current_version: int
    def __init__(self, current_version: _Optional[int] = ...) -> None: ...
