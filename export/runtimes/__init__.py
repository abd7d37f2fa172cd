"""How a target's files are run for the self-check: opened as a device opens them. One implementation for each runtime.

ort      ONNX Runtime: adaptable tensors are given when the session is opened
litert   LiteRT: adaptable tensors are patched into a copy of the file
tensorrt the file alone, in ONNX Runtime: there is no GPU where bundles are made
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from export.quantise import IntegerModel
from export.targets import Artefact, TargetProfile
from refold.errors import UsageError
from refold.norms import NormState

__all__ = ["Fusion", "Runtime", "Tolerance", "runtime_of"]

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Fusion:
    """operators: how many of each type the opened graph has; unfused: layers left as float operators, by name."""

    operators: Mapping[str, int]
    unfused: tuple[str, ...]


@dataclass(frozen=True)
class Tolerance:
    """How far a runtime's rounding may lead away from the cloud's student, which computes in float and rounds once.

    Attributes:
        argmax: least share of pictures on which both choose the same class, ties within a step counted as agreement.
        steps: least share of logits within two steps (of 255 between the lowest and the highest float logit).
        noise: whatever the shares say, a distance below this part of the quantisation error itself is accepted: deep attention
            amplifies a single tied rounding.
        same: least share of pictures on which this and another runtime of the bundle choose the same class.
    """

    argmax: float
    steps: float
    noise: float
    same: float = 0.995


class Runtime(Protocol):
    """Raises GateError where the runtime refuses a file."""

    name: str
    tolerance: Tolerance

    def fusion(self, artefact: Artefact, model: IntegerModel) -> Fusion:
        """Which of `artefact.fused` really run in integers."""

    def structure(self, artefact: Artefact, model: IntegerModel) -> dict[str, float]:
        """What this runtime's files must keep besides, as numbers for the manifest. Raises GateError naming what does not."""

    def logits(self, artefact: Artefact, model: IntegerModel, x: F32, states: Mapping[str, NormState] | None = None) -> F32:
        """float32 (N, 3, H, W) → float32 (N, classes), with norms refolded to `states` (None: as exported)."""

    def written(self, artefact: Artefact, model: IntegerModel, x: F32) -> F32:
        """As `logits`, of a file with the values inside: nothing is refolded."""

    def moments(self, artefact: Artefact, model: IntegerModel, x: F32) -> F32:
        """float32 (N, 3, H, W) → float32 (N, 2, channels) of the tap model."""


def runtime_of(profile: TargetProfile) -> Runtime:
    """Raises UsageError when the runtime is not installed here."""
    if profile.runtime == "litert":
        try:
            from export.runtimes.litert import LiteRt
        except ModuleNotFoundError as e:
            raise UsageError(
                f"Target {profile.name} needs {e.name}, which is not installed: pip install 'refold[litert]'.",
                code="no-runtime",
            ) from e
        return LiteRt()
    if profile.runtime == "tensorrt":
        from export.runtimes.tensorrt import TensorRtFile

        return TensorRtFile()
    from export.runtimes.ort import OnnxRuntime

    return OnnxRuntime()
