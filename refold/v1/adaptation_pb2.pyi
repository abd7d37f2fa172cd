from refold.v1 import norms_pb2 as _norms_pb2
from refold.v1 import samples_pb2 as _samples_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OfferSamplesRequest(_message.Message):
    __slots__ = ("headers",)
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    headers: _containers.RepeatedCompositeFieldContainer[_samples_pb2.SampleHeader]
    def __init__(self, headers: _Optional[_Iterable[_Union[_samples_pb2.SampleHeader, _Mapping]]] = ...) -> None: ...

class OfferSamplesResponse(_message.Message):
    __slots__ = ("wanted", "unwanted", "retry_after_ms")
    WANTED_FIELD_NUMBER: _ClassVar[int]
    UNWANTED_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    wanted: _containers.RepeatedScalarFieldContainer[str]
    unwanted: _containers.RepeatedScalarFieldContainer[str]
    retry_after_ms: int
    def __init__(self, wanted: _Optional[_Iterable[str]] = ..., unwanted: _Optional[_Iterable[str]] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class UploadSamplesRequest(_message.Message):
    __slots__ = ("samples",)
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    samples: _containers.RepeatedCompositeFieldContainer[_samples_pb2.Sample]
    def __init__(self, samples: _Optional[_Iterable[_Union[_samples_pb2.Sample, _Mapping]]] = ...) -> None: ...

class UploadRefusal(_message.Message):
    __slots__ = ("digest", "code", "message")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    digest: str
    code: str
    message: str
    def __init__(self, digest: _Optional[str] = ..., code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class UploadSamplesResponse(_message.Message):
    __slots__ = ("stored", "refused")
    STORED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    stored: _containers.RepeatedScalarFieldContainer[str]
    refused: _containers.RepeatedCompositeFieldContainer[UploadRefusal]
    def __init__(self, stored: _Optional[_Iterable[str]] = ..., refused: _Optional[_Iterable[_Union[UploadRefusal, _Mapping]]] = ...) -> None: ...

class UploadStatisticsRequest(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: _samples_pb2.StatisticsReport
    def __init__(self, report: _Optional[_Union[_samples_pb2.StatisticsReport, _Mapping]] = ...) -> None: ...

class UploadStatisticsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PollReleaseRequest(_message.Message):
    __slots__ = ("bundle_digest", "cohort", "installed_version", "wait_ms")
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    INSTALLED_VERSION_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    bundle_digest: str
    cohort: str
    installed_version: int
    wait_ms: int
    def __init__(self, bundle_digest: _Optional[str] = ..., cohort: _Optional[str] = ..., installed_version: _Optional[int] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class PollReleaseResponse(_message.Message):
    __slots__ = ("release", "use_exported", "next_in_ms", "lease")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    USE_EXPORTED_FIELD_NUMBER: _ClassVar[int]
    NEXT_IN_MS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    release: _norms_pb2.SignedRelease
    use_exported: bool
    next_in_ms: int
    lease: _norms_pb2.SignedLease
    def __init__(self, release: _Optional[_Union[_norms_pb2.SignedRelease, _Mapping]] = ..., use_exported: _Optional[bool] = ..., next_in_ms: _Optional[int] = ..., lease: _Optional[_Union[_norms_pb2.SignedLease, _Mapping]] = ...) -> None: ...
