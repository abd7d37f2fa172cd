from refold.v1 import norms_pb2 as _norms_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Part(_message.Message):
    __slots__ = ("path", "size", "sha256")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    path: str
    size: int
    sha256: str
    def __init__(self, path: _Optional[str] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class Preprocess(_message.Message):
    __slots__ = ("width", "height", "resize", "resize_short", "scale", "mean", "std")
    class Resize(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        RESIZE_UNSPECIFIED: _ClassVar[Preprocess.Resize]
        RESIZE_EXACT: _ClassVar[Preprocess.Resize]
        RESIZE_STRETCH: _ClassVar[Preprocess.Resize]
        RESIZE_CENTRE_CROP: _ClassVar[Preprocess.Resize]
    RESIZE_UNSPECIFIED: Preprocess.Resize
    RESIZE_EXACT: Preprocess.Resize
    RESIZE_STRETCH: Preprocess.Resize
    RESIZE_CENTRE_CROP: Preprocess.Resize
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    RESIZE_FIELD_NUMBER: _ClassVar[int]
    RESIZE_SHORT_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    resize: Preprocess.Resize
    resize_short: int
    scale: float
    mean: _containers.RepeatedScalarFieldContainer[float]
    std: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ..., resize: _Optional[_Union[Preprocess.Resize, str]] = ..., resize_short: _Optional[int] = ..., scale: _Optional[float] = ..., mean: _Optional[_Iterable[float]] = ..., std: _Optional[_Iterable[float]] = ...) -> None: ...

class Target(_message.Message):
    __slots__ = ("name", "model", "taps", "weight_bits", "updatable", "checks")
    class ChecksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TAPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BITS_FIELD_NUMBER: _ClassVar[int]
    UPDATABLE_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: str
    taps: str
    weight_bits: int
    updatable: bool
    checks: _containers.ScalarMap[str, float]
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., taps: _Optional[str] = ..., weight_bits: _Optional[int] = ..., updatable: _Optional[bool] = ..., checks: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Layer(_message.Message):
    __slots__ = ("name", "op", "weight_bits", "weight_bytes", "site", "runs_in", "signal_to_noise")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BITS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    RUNS_IN_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_TO_NOISE_FIELD_NUMBER: _ClassVar[int]
    name: str
    op: str
    weight_bits: int
    weight_bytes: int
    site: str
    runs_in: str
    signal_to_noise: float
    def __init__(self, name: _Optional[str] = ..., op: _Optional[str] = ..., weight_bits: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., site: _Optional[str] = ..., runs_in: _Optional[str] = ..., signal_to_noise: _Optional[float] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("format", "name", "made_by", "created_unix_ms", "input_name", "output_name", "classes", "class_count", "preprocess", "targets", "norms", "student", "calibration", "layers", "parts", "packed", "experts", "statistics", "class_moments", "findings")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MADE_BY_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    INPUT_NAME_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_NAME_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    CLASS_COUNT_FIELD_NUMBER: _ClassVar[int]
    PREPROCESS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    NORMS_FIELD_NUMBER: _ClassVar[int]
    STUDENT_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    PACKED_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    STATISTICS_FIELD_NUMBER: _ClassVar[int]
    CLASS_MOMENTS_FIELD_NUMBER: _ClassVar[int]
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    format: int
    name: str
    made_by: str
    created_unix_ms: int
    input_name: str
    output_name: str
    classes: _containers.RepeatedScalarFieldContainer[str]
    class_count: int
    preprocess: Preprocess
    targets: _containers.RepeatedCompositeFieldContainer[Target]
    norms: _norms_pb2.NormTable
    student: str
    calibration: str
    layers: _containers.RepeatedCompositeFieldContainer[Layer]
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    packed: str
    experts: Experts
    statistics: str
    class_moments: str
    findings: _containers.RepeatedCompositeFieldContainer[Finding]
    def __init__(self, format: _Optional[int] = ..., name: _Optional[str] = ..., made_by: _Optional[str] = ..., created_unix_ms: _Optional[int] = ..., input_name: _Optional[str] = ..., output_name: _Optional[str] = ..., classes: _Optional[_Iterable[str]] = ..., class_count: _Optional[int] = ..., preprocess: _Optional[_Union[Preprocess, _Mapping]] = ..., targets: _Optional[_Iterable[_Union[Target, _Mapping]]] = ..., norms: _Optional[_Union[_norms_pb2.NormTable, _Mapping]] = ..., student: _Optional[str] = ..., calibration: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[Layer, _Mapping]]] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ..., packed: _Optional[str] = ..., experts: _Optional[_Union[Experts, _Mapping]] = ..., statistics: _Optional[str] = ..., class_moments: _Optional[str] = ..., findings: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("code", "message", "numbers")
    class NumbersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    numbers: _containers.ScalarMap[str, float]
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., numbers: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Experts(_message.Message):
    __slots__ = ("family", "config", "resident", "records", "index", "tokenizer", "bytes_as_tokens", "layers", "experts", "top_k", "record_bytes", "resident_bytes", "bits", "measured")
    class BitsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    class MeasuredEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    BYTES_AS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    RECORD_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    family: str
    config: str
    resident: str
    records: str
    index: str
    tokenizer: _containers.RepeatedScalarFieldContainer[str]
    bytes_as_tokens: bool
    layers: int
    experts: int
    top_k: int
    record_bytes: int
    resident_bytes: int
    bits: _containers.ScalarMap[int, int]
    measured: _containers.ScalarMap[str, float]
    def __init__(self, family: _Optional[str] = ..., config: _Optional[str] = ..., resident: _Optional[str] = ..., records: _Optional[str] = ..., index: _Optional[str] = ..., tokenizer: _Optional[_Iterable[str]] = ..., bytes_as_tokens: _Optional[bool] = ..., layers: _Optional[int] = ..., experts: _Optional[int] = ..., top_k: _Optional[int] = ..., record_bytes: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., bits: _Optional[_Mapping[int, int]] = ..., measured: _Optional[_Mapping[str, float]] = ...) -> None: ...

class PackedTensor(_message.Message):
    __slots__ = ("name", "shape", "bits", "offset", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    bits: int
    offset: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., bits: _Optional[int] = ..., offset: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PackedWeights(_message.Message):
    __slots__ = ("tensors",)
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[PackedTensor]
    def __init__(self, tensors: _Optional[_Iterable[_Union[PackedTensor, _Mapping]]] = ...) -> None: ...
