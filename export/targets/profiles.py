"""What each target can run, as data. A writer is registered for a runtime; a profile says how that runtime is on a device.

ort-x86-avx2   ONNX Runtime on x86 without VNNI: 7-bit weight codes, or 16-bit pair sums saturate (packages.md §2)
ort-x86-vnni   ONNX Runtime on x86 with AVX-VNNI or AVX-512-VNNI: 8-bit codes
ort-arm64      ONNX Runtime on 64-bit ARM: 8-bit codes
litert         LiteRT (TensorFlow Lite) on any processor: 8-bit codes, signed, sums in int32
tensorrt       TensorRT 8.6 or newer on an NVIDIA GPU, built there: 8-bit codes, symmetric also in activations, norms unfolded
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from export.operators import OPERATORS, Role
from refold.errors import UsageError

__all__ = ["TARGETS", "Batch", "Granularity", "TargetProfile", "target_named"]


class Granularity(Enum):
    """How many scales a weight tensor may have."""

    TENSOR = "one for the tensor"
    CHANNEL = "one for each output channel"


class Batch(Enum):
    FREE = "any number of pictures at once"
    STATIC = "one picture at a time"


@dataclass(frozen=True)
class TargetProfile:
    """What a writer and a quantiser must know of a target.

    Attributes:
        name: of `--target`; runtime-architecture-instruction set, or the runtime alone where one file serves all.
        runtime: whose writer makes its files: `ort`, `litert` or `tensorrt`.
        qmax: largest absolute weight code its kernels add up without saturating.
        weight_bits: of one weight code.
        integer_operators: operators of the graph it has 8-bit kernels for, those that only move codes among them; others run
            in float between a dequantisation and a quantisation.
        symmetric_weights: weight zero points must be 0.
        granularity: scales per weight tensor.
        activation_codes: lowest and highest activation code.
        zero_points: activations may have a zero point of their own.
        saturating_sums: neighbouring products are added in 16 bits, which is why `qmax` is below 127.
        batch: of the written model.
        compiled_on_device: the device builds its engine from the file: a bundle cannot prove what that engine does.
        model, taps: names of its files.
    """

    name: str
    runtime: str
    qmax: int
    weight_bits: int
    integer_operators: frozenset[str]
    symmetric_weights: bool = True
    granularity: Granularity = Granularity.CHANNEL
    activation_codes: tuple[int, int] = (0, 255)
    zero_points: bool = True
    saturating_sums: bool = False
    batch: Batch = Batch.FREE
    compiled_on_device: bool = False
    model: str = "model.onnx"
    taps: str = "taps.onnx"

    def __post_init__(self) -> None:
        if not 1 <= self.qmax <= 127 or self.qmax > 2 ** (self.weight_bits - 1):
            raise UsageError(f"Target {self.name}: {self.weight_bits}-bit weights have no codes up to {self.qmax}.")
        unknown = sorted(self.integer_operators - set(OPERATORS))
        if unknown:
            raise UsageError(f"Target {self.name}: there is no operator {unknown[0]!r}.")


ORT_OPERATORS = frozenset(name for name, o in OPERATORS.items() if o.role is not Role.FLOAT)
# In 8 bits LOGISTIC has one fixed output scale and AVERAGE_POOL_2D its input's: both would round twice; XNNPACK's LEAKY_RELU
# multiplies by 8-bit numbers. In float they round once, as ONNX Runtime does inside.
LITERT_OPERATORS = ORT_OPERATORS - {"sigmoid", "avg_pool", "leaky_relu"}

TARGETS: dict[str, TargetProfile] = {
    p.name: p
    for p in (
        TargetProfile("ort-x86-avx2", "ort", 64, 7, ORT_OPERATORS, saturating_sums=True),
        TargetProfile("ort-x86-vnni", "ort", 127, 8, ORT_OPERATORS),
        TargetProfile("ort-arm64", "ort", 127, 8, ORT_OPERATORS),
        TargetProfile(
            "litert", "litert", 127, 8, LITERT_OPERATORS, activation_codes=(-128, 127), batch=Batch.STATIC,
            model="model.tflite", taps="taps.tflite",
        ),
        TargetProfile(
            "tensorrt", "tensorrt", 127, 8, ORT_OPERATORS, activation_codes=(-128, 127), zero_points=False, batch=Batch.STATIC,
            compiled_on_device=True,
        ),
    )
}  # fmt: skip


def target_named(name: str) -> TargetProfile:
    """Raises UsageError listing what there is."""
    if name not in TARGETS:
        raise UsageError(f"There is no target {name!r}; there are {', '.join(TARGETS)}.")
    return TARGETS[name]
