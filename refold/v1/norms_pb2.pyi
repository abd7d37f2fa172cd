from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NormKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NORM_KIND_UNSPECIFIED: _ClassVar[NormKind]
    NORM_KIND_FOLDED: _ClassVar[NormKind]
    NORM_KIND_BATCH: _ClassVar[NormKind]
    NORM_KIND_LAYER: _ClassVar[NormKind]
    NORM_KIND_GROUP: _ClassVar[NormKind]
    NORM_KIND_RMS: _ClassVar[NormKind]
NORM_KIND_UNSPECIFIED: NormKind
NORM_KIND_FOLDED: NormKind
NORM_KIND_BATCH: NormKind
NORM_KIND_LAYER: NormKind
NORM_KIND_GROUP: NormKind
NORM_KIND_RMS: NormKind

class NormState(_message.Message):
    __slots__ = ("site", "gamma", "beta", "mean", "variance")
    SITE_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    BETA_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    VARIANCE_FIELD_NUMBER: _ClassVar[int]
    site: str
    gamma: _containers.RepeatedScalarFieldContainer[float]
    beta: _containers.RepeatedScalarFieldContainer[float]
    mean: _containers.RepeatedScalarFieldContainer[float]
    variance: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, site: _Optional[str] = ..., gamma: _Optional[_Iterable[float]] = ..., beta: _Optional[_Iterable[float]] = ..., mean: _Optional[_Iterable[float]] = ..., variance: _Optional[_Iterable[float]] = ...) -> None: ...

class SiteTensors(_message.Message):
    __slots__ = ("weight_scale", "bias", "bias_scale", "multiply", "add")
    WEIGHT_SCALE_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    BIAS_SCALE_FIELD_NUMBER: _ClassVar[int]
    MULTIPLY_FIELD_NUMBER: _ClassVar[int]
    ADD_FIELD_NUMBER: _ClassVar[int]
    weight_scale: str
    bias: str
    bias_scale: str
    multiply: str
    add: str
    def __init__(self, weight_scale: _Optional[str] = ..., bias: _Optional[str] = ..., bias_scale: _Optional[str] = ..., multiply: _Optional[str] = ..., add: _Optional[str] = ...) -> None: ...

class NormSite(_message.Message):
    __slots__ = ("name", "kind", "channels", "epsilon", "has_norm", "sign", "weight_scale", "layer_bias", "scale_floor", "input_tensor", "exported", "tensors", "power_of_two")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    HAS_NORM_FIELD_NUMBER: _ClassVar[int]
    SIGN_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_SCALE_FIELD_NUMBER: _ClassVar[int]
    LAYER_BIAS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FLOOR_FIELD_NUMBER: _ClassVar[int]
    INPUT_TENSOR_FIELD_NUMBER: _ClassVar[int]
    EXPORTED_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    POWER_OF_TWO_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: NormKind
    channels: int
    epsilon: float
    has_norm: bool
    sign: _containers.RepeatedScalarFieldContainer[int]
    weight_scale: _containers.RepeatedScalarFieldContainer[float]
    layer_bias: _containers.RepeatedScalarFieldContainer[float]
    scale_floor: _containers.RepeatedScalarFieldContainer[float]
    input_tensor: str
    exported: NormState
    tensors: SiteTensors
    power_of_two: bool
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[_Union[NormKind, str]] = ..., channels: _Optional[int] = ..., epsilon: _Optional[float] = ..., has_norm: _Optional[bool] = ..., sign: _Optional[_Iterable[int]] = ..., weight_scale: _Optional[_Iterable[float]] = ..., layer_bias: _Optional[_Iterable[float]] = ..., scale_floor: _Optional[_Iterable[float]] = ..., input_tensor: _Optional[str] = ..., exported: _Optional[_Union[NormState, _Mapping]] = ..., tensors: _Optional[_Union[SiteTensors, _Mapping]] = ..., power_of_two: _Optional[bool] = ...) -> None: ...

class ActivationScale(_message.Message):
    __slots__ = ("tensor", "scale", "zero_point", "scale_tensor", "zero_point_tensor")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    ZERO_POINT_FIELD_NUMBER: _ClassVar[int]
    SCALE_TENSOR_FIELD_NUMBER: _ClassVar[int]
    ZERO_POINT_TENSOR_FIELD_NUMBER: _ClassVar[int]
    tensor: str
    scale: float
    zero_point: int
    scale_tensor: str
    zero_point_tensor: str
    def __init__(self, tensor: _Optional[str] = ..., scale: _Optional[float] = ..., zero_point: _Optional[int] = ..., scale_tensor: _Optional[str] = ..., zero_point_tensor: _Optional[str] = ...) -> None: ...

class NormTable(_message.Message):
    __slots__ = ("sites", "activations", "trust_ratio")
    SITES_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    TRUST_RATIO_FIELD_NUMBER: _ClassVar[int]
    sites: _containers.RepeatedCompositeFieldContainer[NormSite]
    activations: _containers.RepeatedCompositeFieldContainer[ActivationScale]
    trust_ratio: float
    def __init__(self, sites: _Optional[_Iterable[_Union[NormSite, _Mapping]]] = ..., activations: _Optional[_Iterable[_Union[ActivationScale, _Mapping]]] = ..., trust_ratio: _Optional[float] = ...) -> None: ...

class ReleaseEvidence(_message.Message):
    __slots__ = ("samples", "statistics_frames", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    STATISTICS_FRAMES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    samples: int
    statistics_frames: int
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, samples: _Optional[int] = ..., statistics_frames: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class PackedStates(_message.Message):
    __slots__ = ("site", "lengths", "planes")
    SITE_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    PLANES_FIELD_NUMBER: _ClassVar[int]
    site: _containers.RepeatedScalarFieldContainer[str]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    planes: bytes
    def __init__(self, site: _Optional[_Iterable[str]] = ..., lengths: _Optional[_Iterable[int]] = ..., planes: _Optional[bytes] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("format", "bundle_digest", "cohort", "version", "parent_version", "created_unix_ms", "expires_unix_ms", "domain", "states", "activations", "evidence", "note")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    format: int
    bundle_digest: str
    cohort: str
    version: int
    parent_version: int
    created_unix_ms: int
    expires_unix_ms: int
    domain: str
    states: PackedStates
    activations: _containers.RepeatedCompositeFieldContainer[ActivationScale]
    evidence: ReleaseEvidence
    note: str
    def __init__(self, format: _Optional[int] = ..., bundle_digest: _Optional[str] = ..., cohort: _Optional[str] = ..., version: _Optional[int] = ..., parent_version: _Optional[int] = ..., created_unix_ms: _Optional[int] = ..., expires_unix_ms: _Optional[int] = ..., domain: _Optional[str] = ..., states: _Optional[_Union[PackedStates, _Mapping]] = ..., activations: _Optional[_Iterable[_Union[ActivationScale, _Mapping]]] = ..., evidence: _Optional[_Union[ReleaseEvidence, _Mapping]] = ..., note: _Optional[str] = ...) -> None: ...

class Signature(_message.Message):
    __slots__ = ("key_id", "ed25519")
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    ED25519_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    ed25519: bytes
    def __init__(self, key_id: _Optional[str] = ..., ed25519: _Optional[bytes] = ...) -> None: ...

class SignedRelease(_message.Message):
    __slots__ = ("payload", "signatures")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    signatures: _containers.RepeatedCompositeFieldContainer[Signature]
    def __init__(self, payload: _Optional[bytes] = ..., signatures: _Optional[_Iterable[_Union[Signature, _Mapping]]] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("format", "bundle_digest", "cohort", "version", "release_digest", "issued_unix_ms", "expires_unix_ms")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RELEASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ISSUED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    format: int
    bundle_digest: str
    cohort: str
    version: int
    release_digest: str
    issued_unix_ms: int
    expires_unix_ms: int
    def __init__(self, format: _Optional[int] = ..., bundle_digest: _Optional[str] = ..., cohort: _Optional[str] = ..., version: _Optional[int] = ..., release_digest: _Optional[str] = ..., issued_unix_ms: _Optional[int] = ..., expires_unix_ms: _Optional[int] = ...) -> None: ...

class SignedLease(_message.Message):
    __slots__ = ("payload", "signatures")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    signatures: _containers.RepeatedCompositeFieldContainer[Signature]
    def __init__(self, payload: _Optional[bytes] = ..., signatures: _Optional[_Iterable[_Union[Signature, _Mapping]]] = ...) -> None: ...
