"""Target writers: a frozen configuration for each name of `--target`, and the function registered for its type.

    ort-x86-avx2   ONNX Runtime on x86 without VNNI: 7-bit weight codes, or 16-bit pair sums saturate (packages.md §2)
    ort-x86-vnni   ONNX Runtime on x86 with AVX-VNNI or AVX-512-VNNI: 8-bit codes
    ort-arm64      ONNX Runtime on 64-bit ARM: 8-bit codes

A new runtime adds a configuration class, registers a writer for it and lists its names in TARGETS; the graph, the integers and
the norm table it is given are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from export.quantise import IntegerModel, WeightCodes
from refold.errors import UsageError

__all__ = ["TARGETS", "Artefact", "OrtTarget", "TargetConfig", "register_writer", "target_named", "write"]


class TargetConfig(Protocol):
    """What every target says of itself; `qmax` is the largest weight code its kernels add up without saturating."""

    @property
    def name(self) -> str: ...
    @property
    def qmax(self) -> int: ...


@dataclass(frozen=True)
class OrtTarget:
    name: str
    qmax: int


@dataclass(frozen=True)
class Artefact:
    """A target's files. `taps` is empty where no norm has statistics.

    Attributes:
        fused: names of the layers that must run in integers once ONNX Runtime has optimised `model`.
        packed: integers of fewer than 7 bits, int8 by initialiser, which the files leave out because all targets share them.
    """

    model: bytes
    taps: bytes
    fused: tuple[str, ...]
    packed: Mapping[str, WeightCodes] = field(default_factory=dict)

    @property
    def codes(self) -> dict[str, NDArray[np.generic]]:
        """What must be given beside the adaptable tensors when a file is opened."""
        return {name: w.codes for name, w in self.packed.items()}


Config = TypeVar("Config")
Writer = Callable[[Any, IntegerModel, bool], Artefact]
_WRITERS: dict[type, Writer] = {}

TARGETS: dict[str, TargetConfig] = {
    t.name: t for t in (OrtTarget("ort-x86-avx2", 64), OrtTarget("ort-x86-vnni", 127), OrtTarget("ort-arm64", 127))
}


def register_writer(config: type[Config]) -> Callable[[Callable[[Config, IntegerModel, bool], Artefact]], Writer]:
    """Registers the function that writes targets of this configuration type."""

    def register(function: Callable[[Config, IntegerModel, bool], Artefact]) -> Writer:
        _WRITERS[config] = function
        return function

    return register


def target_named(name: str) -> TargetConfig:
    """Raises UsageError listing what there is."""
    if name not in TARGETS:
        raise UsageError(f"There is no target {name!r}; there are {', '.join(TARGETS)}.")
    return TARGETS[name]


def write(config: TargetConfig, model: IntegerModel, *, embedded: bool = False) -> Artefact:
    """Writes a target's files.

    Args:
        embedded: put adaptable tensors and packed integers into the file instead of leaving them to be given when it is opened.
    """
    from export.targets import ort  # noqa: F401  (registers its writer)

    return _WRITERS[type(config)](config, model, embedded)
