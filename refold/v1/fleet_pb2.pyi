from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class EnrollRequest(_message.Message):
    __slots__ = ("join_token", "csr_pem", "cohort")
    JOIN_TOKEN_FIELD_NUMBER: _ClassVar[int]
    CSR_PEM_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    join_token: str
    csr_pem: bytes
    cohort: str
    def __init__(self, join_token: _Optional[str] = ..., csr_pem: _Optional[bytes] = ..., cohort: _Optional[str] = ...) -> None: ...

class EnrollResponse(_message.Message):
    __slots__ = ("device_id", "certificate_pem", "ca_pem", "release_keys", "cohort")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    CA_PEM_FIELD_NUMBER: _ClassVar[int]
    RELEASE_KEYS_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    certificate_pem: bytes
    ca_pem: bytes
    release_keys: _containers.RepeatedScalarFieldContainer[bytes]
    cohort: str
    def __init__(self, device_id: _Optional[str] = ..., certificate_pem: _Optional[bytes] = ..., ca_pem: _Optional[bytes] = ..., release_keys: _Optional[_Iterable[bytes]] = ..., cohort: _Optional[str] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("bundle_digest", "release_version", "state", "domain", "metrics", "last_error")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RELEASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    bundle_digest: str
    release_version: int
    state: str
    domain: str
    metrics: _containers.ScalarMap[str, float]
    last_error: str
    def __init__(self, bundle_digest: _Optional[str] = ..., release_version: _Optional[int] = ..., state: _Optional[str] = ..., domain: _Optional[str] = ..., metrics: _Optional[_Mapping[str, float]] = ..., last_error: _Optional[str] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("next_in_ms", "latest_release_version")
    NEXT_IN_MS_FIELD_NUMBER: _ClassVar[int]
    LATEST_RELEASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    next_in_ms: int
    latest_release_version: int
    def __init__(self, next_in_ms: _Optional[int] = ..., latest_release_version: _Optional[int] = ...) -> None: ...
