"""Every error Refold raises on purpose, as one tree.

    RefoldError
    ├── UsageError            exit 2   the command line or a configuration file is wrong
    ├── InputError            exit 3   a picture, a calibration set or a weights file cannot be used
    ├── ModelError            exit 4   the model cannot be exported as asked
    ├── BundleError           exit 5   a `.refold` file is damaged, too new or for something else
    ├── ReleaseError          exit 6   a release is refused
    │   └── SignatureError    exit 6   ... because nobody trusted signed it
    ├── NormStateError        exit 6   a norm state is not admissible for its site
    ├── StorageError          exit 7   a disk is full, read-only or failing
    ├── NetworkError          exit 8   the other side is away, slow or refuses
    ├── AccessError           exit 9   a certificate, token or role does not permit the call
    ├── GateError             exit 10  a self-check or release gate did not pass
    └── InternalError         exit 70  a fault of Refold itself: nobody expected this

Each error has a stable `code` for machines, a `message` that says what happened, to what, and what to do, and an optional
`detail` that goes to logs only. A command prints the message and exits with `exit_code`; a traceback is a bug.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AccessError",
    "BundleError",
    "GateError",
    "InputError",
    "InternalError",
    "ModelError",
    "NetworkError",
    "NormStateError",
    "RefoldError",
    "ReleaseError",
    "SignatureError",
    "StorageError",
    "UsageError",
]


class RefoldError(Exception):
    """Root of the tree.

    Args:
        message: public sentence(s): what happened, to what, what to do.
        code: stable machine-readable name, kebab-case; defaults to the class's own.
        detail: for logs only, never sent to a peer.
    """

    exit_code: ClassVar[int] = 1
    default_code: ClassVar[str] = "refold"

    def __init__(self, message: str, *, code: str | None = None, detail: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.detail = detail


class UsageError(RefoldError):
    exit_code = 2
    default_code = "usage"


class InputError(RefoldError):
    exit_code = 3
    default_code = "input"


class ModelError(RefoldError):
    exit_code = 4
    default_code = "model"


class BundleError(RefoldError):
    exit_code = 5
    default_code = "bundle"


class ReleaseError(RefoldError):
    exit_code = 6
    default_code = "release"


class SignatureError(ReleaseError):
    default_code = "signature"


class NormStateError(RefoldError):
    exit_code = 6
    default_code = "norm-state"


class StorageError(RefoldError):
    exit_code = 7
    default_code = "storage"


class NetworkError(RefoldError):
    exit_code = 8
    default_code = "network"


class AccessError(RefoldError):
    exit_code = 9
    default_code = "access"


class GateError(RefoldError):
    exit_code = 10
    default_code = "gate"


class InternalError(RefoldError):
    """What was going on, with the exception behind it as `__cause__`. Tests treat it as what it is: a bug."""

    exit_code = 70
    default_code = "internal"
