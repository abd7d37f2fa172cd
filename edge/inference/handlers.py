"""What the Open Inference Protocol's calls mean for one bundle; knows neither gRPC nor protobuf."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge.adaptation.corrections import RequestCorrector, as_logits
from edge.engine import EngineSlot
from edge.serving import ServingState
from refold.bundle import Bundle
from refold.errors import InputError, UsageError

__all__ = ["Handlers", "InferenceRequest", "InferenceResult", "Tensor", "UnknownModelError"]

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
NOTHING = np.zeros(0, np.float32)
Observe = Callable[[U8, F32, ServingState, str, float, F32 | None], None]


class UnknownModelError(UsageError):
    default_code = "unknown-model"


@dataclass(frozen=True)
class Tensor:
    """`datatype` is the protocol's word; `values` has the tensor's own shape."""

    name: str
    datatype: str
    values: NDArray[np.generic]


@dataclass(frozen=True)
class InferenceRequest:
    model: str
    version: str
    id: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class InferenceResult:
    """`serving` is the state of the one engine that computed all of `logits`, float32 (N, classes).

    The logits of a corrected answer are the logarithms of its probabilities; `corrected` says how many are.
    """

    logits: F32
    serving: ServingState
    corrected: int = 0


@dataclass
class Handlers:
    """The model as a server of the protocol sees it.

    Args:
        bundle: its name is the model's name.
        slot: one read per request, so that a request is answered by one engine.
        max_batch: pictures per request.
        observe: takes each uint8 picture, its logits and its corrected probabilities afterwards; must return at once.
        corrector: corrects answers for uint8 pictures where its evidence supports it.
        platform: what runs the model, in the protocol's words.
    """

    bundle: Bundle
    slot: EngineSlot
    max_batch: int = 64
    observe: Observe | None = None
    platform: str = "onnxruntime_qdq"
    corrector: RequestCorrector | None = None
    ready: bool = True
    requests: int = field(default=0, init=False)

    @property
    def name(self) -> str:
        return self.bundle.manifest.name or "model"

    @property
    def version(self) -> str:
        """Of the release that serves now; "0" is the exported state."""
        return str(self.slot.current.serving.release_version)

    @property
    def input_name(self) -> str:
        return self.bundle.manifest.input_name or "input"

    @property
    def output_name(self) -> str:
        return self.bundle.manifest.output_name or "logits"

    def check_model(self, name: str, version: str = "") -> None:
        """Raises UnknownModelError. A version may be left out; another than the one that serves now is not here any more."""
        if name != self.name:
            raise UnknownModelError(f"There is no model {name!r} here; the model is called {self.name!r}.")
        if version and version != self.version:
            raise UnknownModelError(f"Version {version} of {name!r} does not serve; release {self.version} does.")

    def inputs(self) -> list[tuple[str, str, list[int]]]:
        """(name, datatype, shape) of what a request may carry: pictures as they are, or the model's own input."""
        p = self.bundle.preprocess
        return [(self.input_name, "UINT8", [-1, p.height, p.width, 3]), (self.input_name, "FP32", [-1, 3, p.height, p.width])]

    def infer(self, request: InferenceRequest) -> InferenceResult:
        """Answers one request with one engine.

        Raises:
            UnknownModelError: not this model or not this version.
            InputError: the tensors are not what the model takes; the sentence says what it takes.
        """
        self.check_model(request.model, request.version)
        for name in request.outputs:
            if name != self.output_name:
                raise InputError(f"There is no output {name!r}; the model has {self.output_name!r}.")
        if len(request.outputs) > 1:
            raise InputError(f"Output {self.output_name!r} is asked for {len(request.outputs)} times: ask once.")
        if len(request.inputs) != 1 or request.inputs[0].name != self.input_name:
            given = ", ".join(repr(t.name) for t in request.inputs) or "none"
            raise InputError(f"The model has one input, {self.input_name!r}; the request carries {given}.")
        started = time.perf_counter()
        values, pictures = self._input(request.inputs[0])
        engine = self.slot.current
        logits = engine.run(values) if pictures is None else engine.run_pictures(pictures)
        self.requests += 1
        corrected: list[F32 | None] = [None] * len(logits)
        if self.corrector is not None and pictures is not None:  # nobody looks for shifts in a float input
            corrected = self.corrector.answer(logits)
        if pictures is not None and self.observe is not None:
            name = request.id or str(self.requests)
            for i, image in enumerate(pictures):
                self.observe(image, logits[i], engine.serving, f"request {name}[{i}]", started, corrected[i])
        count = sum(row is not None for row in corrected)
        if count:
            logits = np.stack([own if row is None else as_logits(row) for own, row in zip(logits, corrected, strict=True)])
        return InferenceResult(logits, engine.serving, count)

    def _input(self, tensor: Tensor) -> tuple[F32, U8 | None]:
        """(what goes straight into the model, None) or (nothing, pictures)."""
        p = self.bundle.preprocess
        wanted = {"UINT8": (p.height, p.width, 3), "FP32": (3, p.height, p.width)}
        if tensor.datatype not in wanted:
            raise InputError(f"Input type {tensor.datatype or 'none'} is not served; send UINT8 pictures or FP32.")
        shape = tensor.values.shape
        if len(shape) != 4 or shape[1:] != wanted[tensor.datatype] or not 1 <= shape[0] <= self.max_batch:
            raise InputError(
                f"An input of type {tensor.datatype} has the shape {_shape(('N', *wanted[tensor.datatype]))} with N from 1 to "
                f"{self.max_batch}; this one has {_shape(shape)}.",
                code="wrong-size",
            )
        if tensor.datatype == "UINT8":
            return NOTHING, tensor.values.astype(np.uint8, copy=False)
        x = np.ascontiguousarray(tensor.values, dtype=np.float32)
        if not np.isfinite(x).all():
            raise InputError("The input has values that are not finite.", code="not-finite")
        return x, None


def _shape(shape: tuple[object, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
