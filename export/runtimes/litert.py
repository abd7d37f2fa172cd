"""LiteRT for the self-check: the file, or a patched copy, one picture at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version

import numpy as np
from ai_edge_litert.schema_py_generated import BuiltinOperator

from export.quantise import IntegerModel
from export.runtimes import F32, Fusion, Tolerance
from export.targets import Artefact
from refold.errors import GateError
from refold.norms import NormState
from refold.tflite import TfliteFile, open_interpreter

__all__ = ["LiteRt", "infer"]

NAMES = {number: name for name, number in vars(BuiltinOperator).items() if not name.startswith("_")}


def infer(content: bytes, x: F32) -> F32:
    """Runs a file over x, float32 (N, 3, H, W). Raises GateError when LiteRT refuses it."""
    try:
        interpreter = open_interpreter(content)
        entry, answer = interpreter.get_input_details()[0], interpreter.get_output_details()[0]["index"]
        given = x.transpose(0, 2, 3, 1)
        if entry["dtype"] == np.int8:
            scale, zero_point = entry["quantization"]
            given = np.clip(np.rint(given / np.float32(scale)) + zero_point, -128, 127).astype(np.int8)
        found = []
        for picture in given:
            interpreter.set_tensor(entry["index"], np.ascontiguousarray(picture[None]))
            interpreter.invoke()
            found.append(interpreter.get_tensor(answer)[0])
    except (RuntimeError, ValueError) as e:
        raise GateError(
            f"LiteRT {version('ai-edge-litert')} refuses the written model: nothing was saved. Please report it.",
            code="engine",
            detail=str(e),
        ) from e
    return np.stack(found)


class LiteRt:
    name = "LiteRT"
    # No looser than ONNX Runtime's: measured distances from the student are a tenth of these (docs/adr/008-litert.md).
    tolerance = Tolerance(argmax=0.995, steps=0.99, noise=0.5)

    def fusion(self, artefact: Artefact, model: IntegerModel) -> Fusion:
        """LiteRT changes no types: a layer runs in integers if its operator in the file reads int8 weights and codes."""
        file = TfliteFile(artefact.model)
        integer = {name.removesuffix(".weight") for name in file.integer_layers()}
        operators = Counter(NAMES[o.builtin] for o in file.operators)
        return Fusion(operators, tuple(name for name in artefact.fused if name not in integer))

    def structure(self, artefact: Artefact, model: IntegerModel) -> dict[str, float]:
        return {}

    def logits(self, artefact: Artefact, model: IntegerModel, x: F32, states: Mapping[str, NormState] | None = None) -> F32:
        return infer(TfliteFile(artefact.model).expanded(artefact.codes).patched(model.table.tensors(states)), x)

    def written(self, artefact: Artefact, model: IntegerModel, x: F32) -> F32:
        return infer(artefact.model, x)

    def moments(self, artefact: Artefact, model: IntegerModel, x: F32) -> F32:
        return infer(TfliteFile(artefact.taps).expanded(artefact.codes).patched(model.table.tensors()), x)
