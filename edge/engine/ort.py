"""ONNX Runtime: which graph, which tensors and which session options make an engine."""

from __future__ import annotations

import hashlib
import logging
import threading
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge.engine.onnx_graph import OnnxGraph
from edge.engine.pictures import Codes
from edge.engine.preoptimised import Graph, disturbed, prepare
from edge.engine.session import OrtEngine, OrtTapEngine, PictureSession
from edge.engine.target import processor
from edge.serving import ServingState
from refold.bundle import Bundle
from refold.errors import BundleError

__all__ = ["OrtRuntime"]

log = logging.getLogger(__name__)
INTEGER_OPERATORS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger")


class OrtRuntime:
    """Args:
        bundle, target: whose model.
        trial: pictures uint8 (N, H, W, 3) on which the short way for pictures must give the float path's answers.
        threads, cache: see `edge.engine.EngineFactory`.

    Raises:
        BundleError: a damaged part, or a model that does not match the bundle's norm table.
    """  # fmt: skip

    platform = "onnxruntime_qdq"

    def __init__(self, bundle: Bundle, target: str, trial: NDArray[np.uint8], *, threads: int, cache: Path | None) -> None:
        self.bundle, self.threads = bundle, threads
        self.named = f"ONNX Runtime {ort.__version__}"
        self.input_name = bundle.manifest.input_name or "input"
        self._cache = cache
        self._lock = threading.Lock()
        self.model = self._prepare(bundle.target(target).model)
        self._taps: Graph | None = None
        self._codes: Codes | None = None
        self._codes_model: tuple[bytes, str, str] | None = None
        self._codes_model = self._prepare_codes(trial)
        self.integer_layers = sum(self.model.operators.get(op, 0) for op in INTEGER_OPERATORS)

    def _prepare(self, part: str) -> Graph:
        model, table = self.bundle.read(part), self.bundle.norms
        packed = self.bundle.packed_weights
        external, named = OnnxGraph(model).externals(), set(table.tensors()) | self.bundle.packed_names()
        if external != named:
            odd = sorted(external ^ named)[0]
            raise BundleError(f"{part} of {self.bundle.path} and its norm table disagree about {odd}.", code="damaged")
        pre = self.bundle.preprocess
        key = hashlib.sha256(f"{self.bundle.digest} {part} {ort.__version__} {processor()}".encode()).hexdigest()[:32]
        return prepare(model, table, (3, pre.height, pre.width), self._cache / f"{key}.graph" if self._cache else None, packed)

    def build(self, serving: ServingState) -> OrtEngine:
        pictures = self._picture_session(serving) if self._codes_model is not None else None
        return OrtEngine(partial(self._open, serving), serving, self.bundle.preprocess, pictures)

    def build_taps(self, serving: ServingState, part: str) -> OrtTapEngine:
        with self._lock:
            if self._taps is None:
                self._taps = self._prepare(part)
        session = self._taps.open(self.bundle.norms, dict(serving.states), serving.activations, self.threads)
        return OrtTapEngine(session, serving)

    def _open(self, serving: ServingState) -> ort.InferenceSession:
        return self.model.open(self.bundle.norms, dict(serving.states), serving.activations, self.threads)

    def _picture_session(self, serving: ServingState) -> PictureSession | None:
        assert self._codes_model is not None
        model, scale, zero_point = self._codes_model
        table, states = self.bundle.norms, dict(serving.states)
        session = self.model.open_codes(model, table, states, serving.activations, self.threads)
        if session is None:
            return None
        entry = next(a for a in table.activations if a.scale_tensor == scale and a.zero_point_tensor == zero_point)
        entry = next((a for a in serving.activations if a.tensor == entry.tensor), entry)
        codes = self._codes  # one read: builds may run on several threads
        if codes is None or (codes.scale, codes.zero_point) != (entry.scale, entry.zero_point):
            codes = self._codes = Codes(self.bundle.preprocess, entry.scale, entry.zero_point)
        return PictureSession(session, codes)

    def _prepare_codes(self, trial: NDArray[np.uint8]) -> tuple[bytes, str, str] | None:
        """The model that takes pictures as they are, once it has given the float path's answers bit for bit."""
        found = OnnxGraph(self.model.optimised).fed_with_codes()
        names = {(a.scale_tensor, a.zero_point_tensor) for a in self.bundle.norms.activations}
        if found is None or found[1:] not in names:
            return None
        self._codes_model = found
        states, scales = disturbed(self.bundle.norms)
        for activations in ((), scales):
            serving = ServingState(states, activations)
            try:
                session = self._picture_session(serving)
                wanted = self._open(serving).run(None, {self.input_name: self.bundle.preprocess.apply(trial)})[0]
            except BundleError as e:
                log.warning("Pictures take the way through floats: %s", e.detail or e)
                return None
            if session is not None and not np.array_equal(session.run_all(trial), wanted):
                log.warning("Pictures take the way through floats: the short way is not exact here.")
                return None
        return found
