"""Builds engines of one bundle: the only place that knows which graph, which tensors and which session options."""

from __future__ import annotations

import hashlib
import logging
import threading
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edge.engine.onnx_graph import OnnxGraph
from edge.engine.pictures import Codes, PictureSession
from edge.engine.preoptimised import Graph, disturbed, prepare
from edge.engine.session import Engine, TapEngine
from edge.engine.target import choose_target, processor
from edge.serving import ServingState
from refold.bundle import Bundle
from refold.errors import BundleError, GateError

__all__ = ["EngineFactory"]

log = logging.getLogger(__name__)
INTEGER_OPERATORS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger")
CANARIES = 4  # pictures a new engine must answer sensibly before it serves


class EngineFactory:
    """Engines of one target of one bundle.

    Args:
        bundle: opened; the parts used are read and checked against their digests here.
        target: name, or None for the one that suits this machine.
        threads: of each session; 1 leaves the other cores to the device's own work.
        cache: directory for optimised graphs, kept across restarts; None keeps them in memory.

    Raises:
        BundleError: nothing for this machine, a damaged part, or a model that does not match the bundle's norm table.
    """

    def __init__(self, bundle: Bundle, target: str | None = None, *, threads: int = 1, cache: Path | None = None) -> None:
        self.bundle = bundle
        self.target = choose_target(bundle, target)
        self.threads = threads
        self._cache = cache
        self._lock = threading.Lock()
        self._model = self._prepare(bundle.target(self.target).model)
        self._taps: Graph | None = None
        self._distinguishes: bool | None = None
        self.input_name = bundle.manifest.input_name or "input"
        self._codes: Codes | None = None
        self._codes_model: tuple[bytes, str, str] | None = None
        self._codes_model = self._prepare_codes()
        self.integer_layers, self.expected_integer_layers = self._count_integer_layers()

    def _prepare(self, part: str) -> Graph:
        model, table = self.bundle.read(part), self.bundle.norms
        packed = self.bundle.packed_weights
        external, named = OnnxGraph(model).externals(), set(table.tensors()) | set(packed())
        if external != named:
            odd = sorted(external ^ named)[0]
            raise BundleError(f"{part} of {self.bundle.path} and its norm table disagree about {odd}.", code="damaged")
        pre = self.bundle.preprocess
        key = hashlib.sha256(f"{self.bundle.digest} {part} {ort.__version__} {processor()}".encode()).hexdigest()[:32]
        return prepare(model, table, (3, pre.height, pre.width), self._cache / f"{key}.graph" if self._cache else None, packed)

    def _count_integer_layers(self) -> tuple[int, int]:
        """(layers that run in integers here, layers that did where the bundle was made); fewer is slower and is said aloud."""
        expected = sum(layer.runs_in == "int8" for layer in self.bundle.manifest.layers)
        fused = sum(self._model.operators.get(op, 0) for op in INTEGER_OPERATORS)
        if fused < expected:
            log.warning(
                "Only %d of %d integer layers of %s run in integers with ONNX Runtime %s; the others are 2 to 3 times slower.",
                fused, expected, self.bundle.path.name, ort.__version__,
            )  # fmt: skip
        return fused, expected

    def build(self, serving: ServingState) -> Engine:
        """Raises NormStateError when the state does not fit the bundle (admit it first), BundleError when ORT refuses."""
        pictures = self._picture_session(serving) if self._codes_model is not None else None
        return Engine(partial(self._open, serving), serving, self.bundle.preprocess, pictures)

    def _open(self, serving: ServingState) -> ort.InferenceSession:
        return self._model.open(self.bundle.norms, dict(serving.states), serving.activations, self.threads)

    def _picture_session(self, serving: ServingState) -> PictureSession | None:
        assert self._codes_model is not None
        model, scale, zero_point = self._codes_model
        table, states = self.bundle.norms, dict(serving.states)
        session = self._model.open_codes(model, table, states, serving.activations, self.threads)
        if session is None:
            return None
        entry = next(a for a in table.activations if a.scale_tensor == scale and a.zero_point_tensor == zero_point)
        entry = next((a for a in serving.activations if a.tensor == entry.tensor), entry)
        codes = self._codes  # one read: builds may run on several threads
        if codes is None or (codes.scale, codes.zero_point) != (entry.scale, entry.zero_point):
            codes = self._codes = Codes(self.bundle.preprocess, entry.scale, entry.zero_point)
        return PictureSession(session, codes)

    def _prepare_codes(self) -> tuple[bytes, str, str] | None:
        """The model that takes pictures as they are, once it has given the float path's answers bit for bit."""
        found = OnnxGraph(self._model.optimised).fed_with_codes()
        names = {(a.scale_tensor, a.zero_point_tensor) for a in self.bundle.norms.activations}
        if found is None or found[1:] not in names:
            return None
        self._codes_model = found
        states, scales = disturbed(self.bundle.norms)
        pictures = self._canary_pictures()
        for activations in ((), scales):
            serving = ServingState(states, activations)
            try:
                session = self._picture_session(serving)
            except BundleError as e:
                log.warning("Pictures take the way through floats: %s", e.detail or e)
                return None
            wanted = self._open(serving).run(None, {self.input_name: self.bundle.preprocess.apply(pictures)})[0]
            if session is not None and not np.array_equal(session.run_all(pictures), wanted):
                log.warning("Pictures take the way through floats: the short way is not exact here.")
                return None
        return found

    def build_taps(self, serving: ServingState) -> TapEngine:
        """The tap twin at the same state. Raises as `build`, and BundleError when the bundle has no tap model."""
        with self._lock:
            if self._taps is None:
                part = self.bundle.target(self.target).taps
                if not part:
                    raise BundleError(f"Target {self.target} of {self.bundle.path} has no tap model.", code="no-taps")
                self._taps = self._prepare(part)
        session = self._taps.open(self.bundle.norms, dict(serving.states), serving.activations, self.threads)
        return TapEngine(session, serving)

    @property
    def has_taps(self) -> bool:
        return bool(self.bundle.target(self.target).taps)

    def canary(self, engine: Engine) -> None:
        """Lets a new engine answer a few pictures before it serves.

        Raises:
            GateError: an answer has the wrong shape or is not finite, or the engine says the same of every picture although the
                exported one does not.
        """
        pictures = self._canary_pictures()
        logits = engine.run_pictures(pictures)
        wanted = (len(pictures), self.bundle.manifest.class_count or logits.shape[-1])
        if logits.shape != wanted or not np.isfinite(logits).all():
            raise GateError("The new engine's answers are not finite or not of the right shape: not served.", code="canary")
        if self._distinguishes is None:
            exported = engine if not engine.serving.states else self.build(ServingState())
            self._distinguishes = _differs(exported.run_pictures(pictures))
        if self._distinguishes and not _differs(logits):
            raise GateError("The new engine gives every picture the same answer: not served.", code="canary")

    def _canary_pictures(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """Blocky noise of different coarseness: uint8 (CANARIES, H, W, 3)."""
        pre = self.bundle.preprocess
        rng = np.random.default_rng(0)
        pictures = []
        for i in range(CANARIES):
            block = 2**i
            coarse = rng.integers(0, 256, (-(-pre.height // block), -(-pre.width // block), 3), dtype=np.uint8)
            pictures.append(coarse.repeat(block, 0).repeat(block, 1)[: pre.height, : pre.width])
        return np.stack(pictures)


def _differs(logits: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> bool:
    return bool((logits != logits[:1]).any())
