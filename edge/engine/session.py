"""Running sessions: an engine, its tap twin, and the slot a frame loop reads them from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge.engine.pictures import PictureSession
from edge.serving import ServingState
from refold.errors import BundleError, InputError
from refold.preprocess import Preprocess

__all__ = ["Engine", "EngineSlot", "TapEngine", "open_session", "session_options"]

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


class Engine:
    """The integer model at one serving state; any thread may run it.

    Attributes:
        serving: the state it was built from.
        pictures: takes 8-bit pictures without a float detour, with the same answers; None where this model or ONNX Runtime
            does not allow it. Then the session for floats is opened when first wanted.
    """

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


class TapEngine(_Session):
    """The same model's tap twin. `run`: float32 (N, 3, H, W) to moments float32 (N, 2, channels).

    Moments are mean and mean square over space of each norm's output, all sites with statistics in order;
    `refold.norms.unfold_moments` brings them back to the norm's input.
    """


class EngineSlot:
    """Where the frame loop finds its engine. Reading and swapping are one pointer each: neither ever waits.

    Who reads `current` keeps that engine for its frame; a swapped-out engine lives until the last such frame is done.
    """

    __slots__ = ("current", "swaps")

    def __init__(self, engine: Engine) -> None:
        self.current = engine
        self.swaps = 0

    def swap(self, engine: Engine) -> Engine:
        """Serves `engine` from the next frame on; returns the one served so far."""
        previous, self.current = self.current, engine
        self.swaps += 1
        return previous
