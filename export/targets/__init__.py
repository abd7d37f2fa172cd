"""Target writers: a *profile* (data, `export.targets.profiles`) for each name of `--target`, a *writer* for each runtime.

A new device of a known runtime is a new profile. A new runtime registers a writer and says, in `export.runtimes`, how its files
are run for the self-check. The graph, the integers and the norm table a writer is given are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from export.quantise import IntegerModel, WeightCodes
from export.targets.profiles import TARGETS, Batch, Granularity, TargetProfile, target_named

__all__ = ["TARGETS", "Artefact", "Batch", "Granularity", "TargetProfile", "register_writer", "target_named", "write"]


@dataclass(frozen=True)
class Artefact:
    """A target's files. `taps` is empty where no norm has statistics.

    Attributes:
        fused: names of the layers that must run in integers once the runtime has opened `model`.
        packed: integers of fewer than 7 bits, int8 by initialiser, which the files leave out because all targets share them.
        beside: other files the device needs, by name.
    """

    model: bytes
    taps: bytes
    fused: tuple[str, ...]
    packed: Mapping[str, WeightCodes] = field(default_factory=dict)
    beside: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def codes(self) -> dict[str, NDArray[np.int8]]:
        """What must be given beside the adaptable tensors when a file is opened."""
        return {name: w.codes for name, w in self.packed.items()}


Writer = Callable[[TargetProfile, IntegerModel, bool], Artefact]
_WRITERS: dict[str, Writer] = {}


def register_writer(runtime: str) -> Callable[[Writer], Writer]:
    """Registers the function that writes the targets of this runtime."""

    def register(function: Writer) -> Writer:
        _WRITERS[runtime] = function
        return function

    return register


def write(profile: TargetProfile, model: IntegerModel, *, embedded: bool = False) -> Artefact:
    """Writes a target's files.

    Args:
        embedded: put adaptable tensors and packed integers into the file instead of leaving them to be given when it is opened.
            A runtime whose files are patched (litert) or read whole (tensorrt) always holds the adaptable ones.

    Raises:
        ModelError: the runtime has no way to express an operator.
    """
    if profile.runtime == "ort":
        from export.targets import ort  # noqa: F401  (registers its writer)
    elif profile.runtime == "litert":
        from export.targets import litert  # noqa: F401  (registers its writer)
    elif profile.runtime == "tensorrt":
        from export.targets import tensorrt  # noqa: F401  (registers its writer)
    return _WRITERS[profile.runtime](profile, model, embedded)
