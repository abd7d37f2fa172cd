from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ImageCodec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_CODEC_UNSPECIFIED: _ClassVar[ImageCodec]
    IMAGE_CODEC_RAW_RGB8: _ClassVar[ImageCodec]
    IMAGE_CODEC_WEBP_LOSSLESS: _ClassVar[ImageCodec]
IMAGE_CODEC_UNSPECIFIED: ImageCodec
IMAGE_CODEC_RAW_RGB8: ImageCodec
IMAGE_CODEC_WEBP_LOSSLESS: ImageCodec

class SampleHeader(_message.Message):
    __slots__ = ("digest", "bundle_digest", "release_version", "preprocess_digest", "score", "entropy", "predicted", "taken_unix_ms", "frame", "domain", "width", "height", "codec", "size", "unbiased")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RELEASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PREPROCESS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    TAKEN_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    UNBIASED_FIELD_NUMBER: _ClassVar[int]
    digest: str
    bundle_digest: str
    release_version: int
    preprocess_digest: str
    score: float
    entropy: float
    predicted: int
    taken_unix_ms: int
    frame: int
    domain: str
    width: int
    height: int
    codec: ImageCodec
    size: int
    unbiased: bool
    def __init__(self, digest: _Optional[str] = ..., bundle_digest: _Optional[str] = ..., release_version: _Optional[int] = ..., preprocess_digest: _Optional[str] = ..., score: _Optional[float] = ..., entropy: _Optional[float] = ..., predicted: _Optional[int] = ..., taken_unix_ms: _Optional[int] = ..., frame: _Optional[int] = ..., domain: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., codec: _Optional[_Union[ImageCodec, str]] = ..., size: _Optional[int] = ..., unbiased: _Optional[bool] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: SampleHeader
    payload: bytes
    def __init__(self, header: _Optional[_Union[SampleHeader, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class SiteStatistics(_message.Message):
    __slots__ = ("site", "mean", "variance")
    SITE_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    VARIANCE_FIELD_NUMBER: _ClassVar[int]
    site: str
    mean: _containers.RepeatedScalarFieldContainer[float]
    variance: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, site: _Optional[str] = ..., mean: _Optional[_Iterable[float]] = ..., variance: _Optional[_Iterable[float]] = ...) -> None: ...

class StatisticsReport(_message.Message):
    __slots__ = ("digest", "bundle_digest", "release_version", "domain", "frames", "first_frame", "last_frame", "sites")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RELEASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    FIRST_FRAME_FIELD_NUMBER: _ClassVar[int]
    LAST_FRAME_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    bundle_digest: str
    release_version: int
    domain: str
    frames: int
    first_frame: int
    last_frame: int
    sites: _containers.RepeatedCompositeFieldContainer[SiteStatistics]
    def __init__(self, digest: _Optional[str] = ..., bundle_digest: _Optional[str] = ..., release_version: _Optional[int] = ..., domain: _Optional[str] = ..., frames: _Optional[int] = ..., first_frame: _Optional[int] = ..., last_frame: _Optional[int] = ..., sites: _Optional[_Iterable[_Union[SiteStatistics, _Mapping]]] = ...) -> None: ...
