"""ONNX Runtime for the self-check."""

from __future__ import annotations

from collections.abc import Mapping

from export.engines import fusion, infer, session
from export.quantise import IntegerModel
from export.runtimes import F32, Fusion, Tolerance
from export.targets import Artefact
from refold.norms import NormState

__all__ = ["OnnxRuntime"]


def _exact(model: IntegerModel) -> bool:
    """8-bit codes are summed without saturation also where this machine lacks VNNI."""
    return model.qmax > 64


class OnnxRuntime:
    name = "ONNX Runtime"
    tolerance = Tolerance(argmax=0.995, steps=0.99, noise=0.5)

    def fusion(self, artefact: Artefact, model: IntegerModel) -> Fusion:
        return fusion(artefact.model, model.table.tensors() | artefact.codes, artefact.fused)

    def structure(self, artefact: Artefact, model: IntegerModel) -> dict[str, float]:
        return {}

    def logits(self, artefact: Artefact, model: IntegerModel, x: F32, states: Mapping[str, NormState] | None = None) -> F32:
        return infer(session(artefact.model, model.table.tensors(states) | artefact.codes, exact=_exact(model)), x)

    def written(self, artefact: Artefact, model: IntegerModel, x: F32) -> F32:
        return infer(session(artefact.model, exact=_exact(model)), x)

    def moments(self, artefact: Artefact, model: IntegerModel, x: F32) -> F32:
        return infer(session(artefact.taps, model.table.tensors() | artefact.codes, exact=_exact(model)), x)
