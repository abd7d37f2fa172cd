"""The file of a TensorRT target for the self-check: run as written by ONNX Runtime, and asked for TensorRT's rules.

No TensorRT is here. ONNX Runtime runs the very file with its optimiser off: quantisations and dequantisations as they stand,
sums in float, so that 8-bit codes cannot saturate as on a processor without VNNI. What only an engine can show, a device checks
when it has built one (`edge.engine.tensorrt`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from export.engines import infer, session
from export.quantise import IntegerModel
from export.runtimes import F32, Fusion, Tolerance
from export.targets import Artefact
from export.targets.tensorrt_rules import violations
from refold.errors import GateError
from refold.norms import NormState, NormTable
from refold.tensorrt import RECIPE, BuildRecipe, file_tensors

__all__ = ["TensorRtFile", "replaced"]


def replaced(content: bytes, values: Mapping[str, NDArray[np.generic]]) -> bytes:
    """The same file with other values in the named initialisers."""
    model = onnx.load_from_string(content)
    for tensor in model.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(np.reshape(values[tensor.name], tuple(tensor.dims)), tensor.name))
    return bytes(model.SerializeToString(deterministic=True))


def norms_at(table: NormTable, states: Mapping[str, NormState] | None) -> dict[str, NDArray[np.generic]]:
    """Every norm vector of a file at the given states, by name."""
    found: dict[str, NDArray[np.generic]] = {}
    for site in table.norms:
        found |= file_tensors(site, (states or {}).get(site.name, site.exported))
    return found


class TensorRtFile:
    name = "TensorRT's file"
    # Activations that start at zero have half as many codes here as the student's (docs/adr/010-tensorrt.md).
    tolerance = Tolerance(argmax=0.97, steps=0.5, noise=2.0, same=0.95)

    def fusion(self, artefact: Artefact, model: IntegerModel) -> Fusion:
        """By the rules of fusion: a layer reads dequantised codes, and is quantised behind its norm and activation."""
        recipe = BuildRecipe.from_json(artefact.beside[RECIPE], RECIPE)
        odd = {v.layer for v in violations(artefact.model, artefact.fused, recipe)}
        operators = Counter(n.op_type for n in onnx.load_from_string(artefact.model).graph.node)
        return Fusion(operators, tuple(n for n in artefact.fused if n in odd))

    def structure(self, artefact: Artefact, model: IntegerModel) -> dict[str, float]:
        recipe = BuildRecipe.from_json(artefact.beside[RECIPE], RECIPE)
        for content, layers in ((artefact.model, artefact.fused), (artefact.taps, ())):
            found = next(violations(content, layers, recipe, partial=not layers), None) if content else None
            if found is not None:
                raise GateError(
                    f"tensorrt: {found.layer} of the written file {found.what}: TensorRT would not build it as meant, nothing "
                    "was saved. Please report it with the model.",
                    code="structure",
                )
        return {"structure_checked": 1.0}

    def logits(self, artefact: Artefact, model: IntegerModel, x: F32, states: Mapping[str, NormState] | None = None) -> F32:
        return _run(replaced(artefact.model, norms_at(model.table, states)), x)

    def written(self, artefact: Artefact, model: IntegerModel, x: F32) -> F32:
        return _run(artefact.model, x)

    def moments(self, artefact: Artefact, model: IntegerModel, x: F32) -> F32:
        return _run(artefact.taps, x)


def _run(content: bytes, x: F32) -> F32:
    return infer(session(content, optimise=False), x, batch=1)
