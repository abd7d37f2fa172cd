"""ONNX Runtime's own static quantisation of the float net: QDQ, per channel, 7-bit codes in 8 (no saturation without VNNI)."""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn

from export.elastic.data import Labelled
from export.engines import infer, session
from refold.preprocess import Preprocess

__all__ = ["ptq_accuracy"]


def ptq_accuracy(
    net: nn.Module, data: Labelled, calibration: NDArray[np.int64], held: NDArray[np.int64], preprocess: Preprocess
) -> float:
    """Top-1 on `held`, 0..1.

    Args:
        net: in float, in evaluation mode.
        calibration, held: indices into `data`.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[torch.Tensor] = data.batches(preprocess, calibration, 16)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"input": batch.numpy()}

    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's deprecation notes
        torch.onnx.export(
            net, (torch.zeros(1, 3, preprocess.height, preprocess.width),), content, dynamo=False, opset_version=17,  # type: ignore[arg-type]
            input_names=["input"], output_names=["logits"], dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
        )  # fmt: skip
    ort.set_default_logger_severity(3)
    with tempfile.TemporaryDirectory(prefix="refold-ptq-") as folder:
        plain, ready, done = (Path(folder) / f"{name}.onnx" for name in ("plain", "ready", "done"))
        plain.write_bytes(content.getvalue())
        quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
        quantize_static(str(ready), str(done), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True)
        engine = session(done.read_bytes())
    logits = np.concatenate([infer(engine, b.numpy()) for b in data.batches(preprocess, held, 64)])
    return float((logits.argmax(1) == data.labels[held]).mean())
