"""LiteRT (TensorFlow Lite): an engine is a patched copy of the model file and an interpreter of its own.

The file takes one picture, as signed codes with the channels last, which is what a pixel table gives; floats are quantised
here, with the rounding ONNX Runtime has. An interpreter is one state machine: a lock lets any thread run it.
"""

from __future__ import annotations

import threading
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from edge.engine.pictures import Codes, Scratch
from edge.serving import ServingState
from refold.bundle import Bundle
from refold.errors import BundleError, InputError
from refold.norms import ActivationScale
from refold.preprocess import Preprocess
from refold.tflite import CODE_OFFSET, TfliteFile, open_interpreter

__all__ = ["LiteRtEngine", "LiteRtRuntime", "LiteRtTapEngine"]

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


class _Session:
    """One interpreter. `run`: what the file takes, (1, H, W, 3), to what it gives, float32 (1, ...)."""

    def __init__(self, content: bytes, threads: int) -> None:
        try:
            self._interpreter = open_interpreter(content, threads)
        except (RuntimeError, ValueError) as e:
            raise BundleError(
                f"LiteRT {version('ai-edge-litert')} does not open the bundle's model; export it again for this version.",
                code="engine",
                detail=str(e),
            ) from e
        entry = self._interpreter.get_input_details()[0]
        self._input, self._output = entry["index"], self._interpreter.get_output_details()[0]["index"]
        self.codes = entry["dtype"] == np.int8
        self._running = threading.Lock()

    def run(self, x: NDArray[np.generic]) -> F32:
        with self._running:
            self._interpreter.set_tensor(self._input, x)
            self._interpreter.invoke()
            return self._interpreter.get_tensor(self._output)  # type: ignore[no-any-return]


class _Floats:
    """Float pictures through a session, one after the other.

    Args:
        entry: scale and zero point of the model's input at this state; None where the file takes floats.
    """

    def __init__(self, session: _Session, serving: ServingState, preprocess: Preprocess, entry: ActivationScale | None) -> None:
        self.serving = serving
        self._session, self._preprocess, self._entry = session, preprocess, entry

    def run(self, x: F32) -> F32:
        height, width, _ = self._preprocess.shape
        if x.ndim != 4 or x.shape[1:] != (3, height, width) or x.dtype != np.float32 or not len(x):
            raise InputError(f"The engine does not take an input of shape {tuple(x.shape)} and type {x.dtype}.", code="shape")
        given: NDArray[np.generic] = x.transpose(0, 2, 3, 1)
        if self._entry is not None:
            steps = np.rint(given / np.float32(self._entry.scale)) + np.float32(self._entry.zero_point)
            given = (np.clip(steps, 0, 255) - CODE_OFFSET).astype(np.int8)
        return np.concatenate([self._session.run(np.ascontiguousarray(given[i : i + 1])) for i in range(len(given))])


class LiteRtTapEngine(_Floats):
    """See `edge.engine.engine.TapEngine`."""


class _Pictures:
    """See `edge.engine.engine.PictureEngine`."""

    def __init__(self, session: _Session, codes: Codes) -> None:
        self._session, self._codes = session, codes

    def run(self, image: U8, scratch: Scratch) -> F32:
        self._codes.fill(image, scratch)
        return self._session.run(np.bitwise_xor(scratch.codes, CODE_OFFSET).view(np.int8))  # less 128, wrapping

    def run_all(self, images: U8) -> F32:
        scratch = Scratch(*images.shape[1:3])
        return np.concatenate([self.run(np.ascontiguousarray(image), scratch) for image in images])


class LiteRtEngine(_Floats):
    """See `edge.engine.engine.Engine`."""

    def __init__(
        self,
        session: _Session,
        serving: ServingState,
        preprocess: Preprocess,
        entry: ActivationScale | None,
        codes: Codes | None,
    ) -> None:
        super().__init__(session, serving, preprocess, entry)
        self.pictures = _Pictures(session, codes) if codes is not None else None

    def run_pictures(self, images: U8) -> F32:
        if self.pictures is None or images.shape[1:] != self._preprocess.shape or images.dtype != np.uint8 or not len(images):
            return self.run(self._preprocess.apply(images))
        return self.pictures.run_all(images)


class LiteRtRuntime:
    """Args:
        bundle, target: whose model.
        threads: of each interpreter.

    Raises:
        BundleError: a damaged part, or a model that does not match the bundle's norm table.
    """  # fmt: skip

    platform = "tensorflow_lite"

    def __init__(self, bundle: Bundle, target: str, *, threads: int) -> None:
        self.bundle, self.threads = bundle, threads
        self.named = f"LiteRT {version('ai-edge-litert')}"
        self._model = self._read(bundle.target(target).model)
        self._taps: TfliteFile | None = None
        self._codes: Codes | None = None
        self._lock = threading.Lock()
        self.integer_layers = len(self._model.integer_layers())

    def _read(self, part: str) -> TfliteFile:
        file, pre = TfliteFile(self.bundle.read(part)), self.bundle.preprocess
        odd = sorted(set(file.adaptable) ^ set(self.bundle.norms.tensors()))  # taps: all layers are in the file, if not all run
        if odd:
            raise BundleError(f"{part} of {self.bundle.path} and its norm table disagree about {odd[0]}.", code="damaged")
        if len(file.inputs) != 1 or len(file.outputs) != 1 or file.tensors[file.inputs[0]].shape != (1, *pre.shape):
            raise BundleError(f"{part} of {self.bundle.path} does not take one picture of its preprocessing.", code="damaged")
        return file

    def _session(self, file: TfliteFile, serving: ServingState) -> _Session:
        return _Session(file.patched(self.bundle.norms.tensors(serving.states, serving.activations)), self.threads)

    def _entry(self, file: TfliteFile, serving: ServingState) -> ActivationScale | None:
        """Scale and zero point of the file's input: said by what the file's own input tensor carries."""
        carried = [name for name, carriers in file.adaptable.items() if ("scale", file.inputs[0]) in carriers]
        table = self.bundle.norms
        entry = next((a for a in table.activations if a.scale_tensor in carried), None)
        return None if entry is None else next((a for a in serving.activations if a.tensor == entry.tensor), entry)

    def build(self, serving: ServingState) -> LiteRtEngine:
        session, entry = self._session(self._model, serving), self._entry(self._model, serving)
        codes = self._codes  # one read: builds may run on several threads
        if entry is None or not session.codes:
            entry = codes = None
        elif codes is None or (codes.scale, codes.zero_point) != (entry.scale, entry.zero_point):
            codes = self._codes = Codes(self.bundle.preprocess, entry.scale, entry.zero_point)
        return LiteRtEngine(session, serving, self.bundle.preprocess, entry, codes)

    def build_taps(self, serving: ServingState, part: str) -> LiteRtTapEngine:
        with self._lock:
            if self._taps is None:
                self._taps = self._read(part)
        session, entry = self._session(self._taps, serving), self._entry(self._taps, serving)
        return LiteRtTapEngine(session, serving, self.bundle.preprocess, entry if session.codes else None)
