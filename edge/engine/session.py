"""Running sessions of ONNX Runtime: an engine, the one that takes pictures, and the tap twin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge.engine.pictures import Codes, Scratch
from edge.serving import ServingState
from refold.errors import BundleError, InputError
from refold.preprocess import Preprocess

__all__ = ["OrtEngine", "OrtTapEngine", "PictureSession", "open_session", "session_options"]

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


def session_options(threads: int = 1, *, optimise: bool = True) -> ort.SessionOptions:
    """Sequential, on `threads` threads that sleep when idle: a device has other work for its cores."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # its warnings are for people who write graphs; ours is the fused-operator count
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    return options


def open_session(
    model: bytes, tensors: Mapping[str, NDArray[np.generic]], options: ort.SessionOptions, **extra: Any
) -> ort.InferenceSession:
    """A session of `model` with its external initialisers set to `tensors`; the values are copied by ONNX Runtime.

    Raises:
        BundleError: ONNX Runtime refuses the model or a tensor does not fit it.
    """
    values = [ort.OrtValue.ortvalue_from_numpy(np.asarray(v, order="C")) for v in tensors.values()]
    options.add_external_initializers(list(tensors), values)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], **extra)
    except Exception as e:  # ONNX Runtime's exceptions share no base class
        raise BundleError(
            f"ONNX Runtime {ort.__version__} does not open the bundle's model; export it again for this version.",
            code="engine",
            detail=str(e),
        ) from e


class _Session:
    def __init__(self, session: ort.InferenceSession, serving: ServingState) -> None:
        self.serving = serving
        self._session = session
        self._run = session.run
        self._input = session.get_inputs()[0].name
        self._outputs = [session.get_outputs()[0].name]

    def run(self, x: F32) -> F32:
        try:
            return self._run(self._outputs, {self._input: x})[0]  # type: ignore[no-any-return]
        except Exception as e:
            raise InputError(
                f"The engine does not take an input of shape {tuple(x.shape)} and type {x.dtype}.", code="shape", detail=str(e)
            ) from e


class PictureSession:
    """A session whose input is codes, uint8 (N, H, W, 3)."""

    def __init__(self, session: ort.InferenceSession, codes: Codes) -> None:
        self._run = session.run
        self._input = session.get_inputs()[0].name
        self._outputs = [session.get_outputs()[0].name]
        self._codes = codes

    def run(self, image: U8, scratch: Scratch) -> F32:
        """Logits float32 (1, classes) of one C-contiguous picture, uint8 (H, W, 3), whose shape the caller has checked."""
        self._codes.fill(image, scratch)
        return self._run(self._outputs, {self._input: scratch.codes})[0]  # type: ignore[no-any-return]

    def run_all(self, images: U8) -> F32:
        """Logits float32 (N, classes) of pictures uint8 (N, H, W, 3)."""
        n, height, width, _ = images.shape
        scratch, codes = Scratch(height, width), np.empty(images.shape, np.uint8)
        for i in range(n):
            self._codes.fill(np.ascontiguousarray(images[i]), scratch)
            codes[i] = scratch.codes[0]
        return self._run(self._outputs, {self._input: codes})[0]  # type: ignore[no-any-return]


class OrtEngine:
    """See `edge.engine.engine.Engine`. Where pictures have their own way, floats get a session when first wanted."""

    def __init__(
        self,
        open_session: Callable[[], ort.InferenceSession],
        serving: ServingState,
        preprocess: Preprocess,
        pictures: PictureSession | None = None,
    ) -> None:
        self.serving = serving
        self.pictures = pictures
        self._preprocess = preprocess
        self._open = open_session
        self._floats = None if pictures is not None else _Session(open_session(), serving)

    def run(self, x: F32) -> F32:
        """float32 (N, 3, H, W) to logits float32 (N, classes). Raises InputError for another shape."""
        if self._floats is None:
            self._floats = _Session(self._open(), self.serving)
        return self._floats.run(x)

    def run_pictures(self, images: U8) -> F32:
        """uint8 (N, H, W, 3), as the preprocessing takes them, to logits float32 (N, classes). Raises InputError as `apply`."""
        if self.pictures is None or images.shape[1:] != self._preprocess.shape or images.dtype != np.uint8:
            return self.run(self._preprocess.apply(images))
        return self.pictures.run_all(images)


class OrtTapEngine(_Session):
    """See `edge.engine.engine.TapEngine`."""
