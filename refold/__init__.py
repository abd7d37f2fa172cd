"""The core every side shares: bundles, norm sites, refolding, releases, signatures. numpy and protobuf, never torch."""

from refold._version import __version__
from refold.bundle import Bundle, write_bundle
from refold.errors import RefoldError
from refold.norms import (
    ActivationScale,
    ExplicitAffine,
    FoldedAffine,
    NormKind,
    NormSite,
    NormState,
    NormTable,
    refold,
)
from refold.preprocess import Preprocess, Resize
from refold.release import Release
from refold.signing import KeyRing, SigningKey

__all__ = [
    "ActivationScale",
    "Bundle",
    "ExplicitAffine",
    "FoldedAffine",
    "KeyRing",
    "NormKind",
    "NormSite",
    "NormState",
    "NormTable",
    "Preprocess",
    "RefoldError",
    "Release",
    "Resize",
    "SigningKey",
    "__version__",
    "refold",
    "write_bundle",
]
