"""ONNX Runtime sessions for the self-check: opened as a device opens them, and a count of what was fused."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from export.runtimes import Fusion
from refold.errors import GateError

__all__ = ["fusion", "infer", "session"]

F32 = NDArray[np.float32]
BATCH = 16
FLOAT_LAYERS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def session(
    model: bytes,
    tensors: Mapping[str, NDArray[np.generic]] | None = None,
    *,
    exact: bool = False,
    optimise: bool = True,
    optimised: Path | None = None,
    profile: Path | None = None,
) -> ort.InferenceSession:
    """Opens a model.

    Args:
        tensors: the adaptable tensors; None for a model that holds its own.
        exact: sum 8-bit weight codes without saturation on processors that lack VNNI (slower, same numbers as with it).
        optimise: False: every operator runs as written, quantisation and dequantisation included, and sums are in float.
        optimised: where to leave the optimised graph.
        profile: beginning of the name of the file of times that `end_profiling` leaves.

    Raises:
        GateError: ONNX Runtime refuses the model.
    """
    options = _options()
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if tensors is not None:
        values = [ort.OrtValue.ortvalue_from_numpy(np.asarray(v, order="C")) for v in tensors.values()]
        options.add_external_initializers(list(tensors), values)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # ONNX Runtime's exceptions share no base class
        raise GateError(
            f"ONNX Runtime {ort.__version__} refuses the written model: nothing was saved. Please report it with the model.",
            code="engine",
            detail=str(e),
        ) from e


def infer(engine: ort.InferenceSession, x: F32, batch: int = BATCH) -> F32:
    """Runs a session over x, float32 (N, 3, H, W), in batches."""
    name = engine.get_inputs()[0].name
    return np.concatenate([engine.run(None, {name: x[i : i + batch]})[0] for i in range(0, len(x), batch)])


def fusion(model: bytes, tensors: Mapping[str, NDArray[np.generic]], wanted: tuple[str, ...]) -> Fusion:
    """Which of the layers `wanted` ONNX Runtime really runs in integers."""
    with tempfile.TemporaryDirectory(prefix="refold-export-") as scratch:
        path = Path(scratch) / "optimised.onnx"
        session(model, tensors, optimised=path)
        graph = onnx.load(path).graph
    # A fused node keeps its layer's name as the beginning of its own (conv1_quant, conv1_nchwc, ...).
    left = {node.name for node in graph.node if node.op_type in FLOAT_LAYERS}
    return Fusion(Counter(n.op_type for n in graph.node), tuple(w for w in wanted if w in left))
