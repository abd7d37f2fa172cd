"""TensorRT: an engine is compiled here, on the device, once; a state is a second copy of it with other norms put in.

The plan is built from the bundle's ONNX file, proves itself, and is kept in the cache. `build` makes an engine of it beside the
one that serves, refits that, and hands it over: whoever still runs the old one keeps it. Releases that change activation scales
cost a new plan, because TensorRT does not promise that a scale of Q and DQ can be refitted.

An engine that cannot be updated is worse here than none, so a new plan must show, before it is ever used, that

    every vector of every norm can be exchanged in it;
    it answers as an ordinary engine does (NVIDIA's 11.3 notes know a refittable one that drops a bias);
    it answers as the file does in ONNX Runtime, as exported and after norms far from those were put in.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge.engine.cuda import Cuda, DriverCuda
from edge.engine.engine import PictureEngine
from edge.engine.onnx_graph import OnnxGraph
from edge.engine.session import session_options
from edge.engine.trt_api import CudaEngine, TensorRt, load_tensorrt
from edge.engine.trt_build import build_plan, keep_plan, kept_plan, refit, refittable_weights
from edge.serving import ServingState
from refold.bundle import Bundle
from refold.errors import BundleError, InputError
from refold.norms import ActivationScale, NormState, NormTable
from refold.preprocess import Preprocess
from refold.tensorrt import RECIPE, BuildRecipe, RefitSite, file_tensors, refit_vectors, symmetric

__all__ = ["TensorRtEngine", "TensorRtRuntime", "TensorRtTapEngine", "distant"]

log = logging.getLogger(__name__)
U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
INPUT, LOGITS, MOMENTS = "input", "logits", "moments"
# Root mean square distance over the spread of the reference. Chosen, not measured: no GPU has run this yet (ADR 010).
PLAIN_APART = 0.05  # two engines that may use other kernels
FILE_APART = 0.15  # an engine and the file in float: codes on a tie fall either way
PLANS = 3  # in memory: as exported, served, and one being tried


class _Execution:
    """One engine, its context, stream and buffers. `run`: float32 (1, 3, H, W) to float32 (1, ...), one caller at a time."""

    def __init__(self, cuda: Cuda, engine: CudaEngine, output: str) -> None:
        self._cuda, self._engine = cuda, engine
        self._shape = tuple(engine.get_tensor_shape(output))
        self.takes = tuple(engine.get_tensor_shape(INPUT))
        cuda.enter()
        context = engine.create_execution_context()
        if context is None:
            raise BundleError("TensorRT cannot make room for another engine on the GPU.", code="gpu")
        self._context = context
        self._stream = cuda.stream()
        self._given = cuda.allocate(int(np.prod(self.takes)) * 4)
        self._made = cuda.allocate(int(np.prod(self._shape)) * 4)
        weakref.finalize(self, cuda.release, self._stream, (self._given, self._made)).atexit = False
        self._addressed = context.set_tensor_address(INPUT, self._given) and context.set_tensor_address(output, self._made)
        self._running = threading.Lock()

    def run(self, x: F32) -> F32:
        answer = np.empty(self._shape, np.float32)
        with self._running:
            self._cuda.enter()
            self._cuda.upload(self._given, x, self._stream)
            if not (self._addressed and self._context.execute_async_v3(self._stream)):
                raise BundleError("TensorRT could not run the engine; see its own messages.", code="gpu")
            self._cuda.download(answer, self._made, self._stream)
            self._cuda.synchronise(self._stream)
        return answer


class _Floats:
    def __init__(self, execution: _Execution, serving: ServingState, preprocess: Preprocess) -> None:
        self.serving = serving
        self._execution, self._preprocess = execution, preprocess

    def run(self, x: F32) -> F32:
        height, width, _ = self._preprocess.shape
        if x.ndim != 4 or x.shape[1:] != (3, height, width) or x.dtype != np.float32 or not len(x):
            raise InputError(f"The engine does not take an input of shape {tuple(x.shape)} and type {x.dtype}.", code="shape")
        return np.concatenate([self._execution.run(np.ascontiguousarray(x[i : i + 1])) for i in range(len(x))])


class TensorRtTapEngine(_Floats):
    """See `edge.engine.engine.TapEngine`."""


class TensorRtEngine(_Floats):
    """See `edge.engine.engine.Engine`. The GPU quantises pictures itself: there is no shorter way for them."""

    pictures: PictureEngine | None = None

    def run_pictures(self, images: U8) -> F32:
        return self.run(self._preprocess.apply(images))


class TensorRtRuntime:
    """Args:
        bundle, target: whose model.
        trial: pictures uint8 (N, H, W, 3) on which a new plan must prove itself.
        cache: see `edge.engine.EngineFactory`.
        trt, cuda: the package and the GPU; None: what is installed here.

    Raises:
        BundleError: TensorRT or a GPU is not here, a damaged part, a file that does not match the bundle's norm table, a plan
            that cannot be built or cannot be updated.
    """  # fmt: skip

    platform = "tensorrt_plan"

    def __init__(
        self,
        bundle: Bundle,
        target: str,
        trial: U8,
        *,
        cache: Path | None,
        trt: TensorRt | None = None,
        cuda: Cuda | None = None,
    ) -> None:
        self._trt = trt or load_tensorrt()
        self._cuda: Cuda = cuda or DriverCuda()
        self.bundle = bundle
        self.named = f"TensorRT {self._trt.__version__} on {self._cuda.name}"
        self._trial, self._cache = trial, cache
        self._cuda.enter()
        self._logger = self._trt.Logger(self._trt.Logger.WARNING)
        self._reader = self._trt.Runtime(self._logger)
        self._model = bundle.target(target).model
        self._recipe = self._read_recipe(str(PurePosixPath(self._model).with_name(RECIPE)))
        self.integer_layers = self._recipe.integer_layers
        self._plans: dict[str, bytes] = {}
        self._recipes: dict[str, BuildRecipe] = {}
        self._lock = threading.Lock()
        self._plan(self._model, LOGITS, ())

    def _read_recipe(self, part: str) -> BuildRecipe:
        recipe = BuildRecipe.from_json(self.bundle.read(part), f"{part} of {self.bundle.path}")
        if recipe.sites != tuple(RefitSite.of(s) for s in self.bundle.norms.norms):
            raise BundleError(f"{part} of {self.bundle.path} and its norm table disagree about the norms.", code="damaged")
        return recipe

    def build(self, serving: ServingState) -> TensorRtEngine:
        return TensorRtEngine(self._execution(self._model, LOGITS, serving), serving, self.bundle.preprocess)

    def build_taps(self, serving: ServingState, part: str) -> TensorRtTapEngine:
        return TensorRtTapEngine(self._execution(part, MOMENTS, serving), serving, self.bundle.preprocess)

    def _execution(self, part: str, output: str, serving: ServingState) -> _Execution:
        engine = self._engine(self._plan(part, output, serving.activations))
        vectors = self._vectors(serving.states, self._recipe_of(part))
        refit(self._trt, self._logger, engine, vectors)
        return self._started(engine, output, part)

    def _vectors(self, states: Mapping[str, NormState], recipe: BuildRecipe) -> dict[str, F32]:
        found: dict[str, F32] = {}
        for named in recipe.sites:
            site = self.bundle.norms.site(named.site)
            vectors = refit_vectors(site, states.get(site.name, site.exported))
            found |= {name: np.array(v, np.float32) for name, v in zip(named.weights, vectors, strict=True)}
        return found

    def _recipe_of(self, part: str) -> BuildRecipe:
        """With the norms of a part: no moments come from behind the last tapped norm, so the tap model ends there."""
        if part == self._model:
            return self._recipe
        if part not in self._recipes:
            there = OnnxGraph(self.bundle.read(part)).initialisers()
            sites = tuple(s for s in self._recipe.sites if there.issuperset(s.initialisers))
            self._recipes[part] = replace(self._recipe, sites=sites)
        return self._recipes[part]

    def _engine(self, plan: bytes) -> CudaEngine:
        self._cuda.enter()
        engine = self._reader.deserialize_cuda_engine(plan)
        if engine is None:
            raise BundleError(f"{self.named} does not open the engine it built.", code="engine")
        return engine

    def _started(self, engine: CudaEngine, output: str, part: str) -> _Execution:
        execution, (height, width, _) = _Execution(self._cuda, engine, output), self.bundle.preprocess.shape
        if execution.takes != (1, 3, height, width):
            raise BundleError(f"{part} of {self.bundle.path} does not take one picture of its preprocessing.", code="damaged")
        return execution

    def _plan(self, part: str, output: str, activations: tuple[ActivationScale, ...]) -> bytes:
        """The plan of a part at these activation scales: of memory, of the cache, or built now and proved."""
        model = self._file(part, activations)
        told = [self.bundle.digest, part, hashlib.sha256(model).hexdigest(), self._trt.__version__, self._cuda.name]
        key = hashlib.sha256(" ".join(told).encode()).hexdigest()[:32]
        with self._lock:
            plan = self._plans.pop(key, None)
            if plan is None:
                plan = self._kept(key) or self._built(key, model, output, part)
            self._plans[key] = plan
            while len(self._plans) > PLANS * 2:  # model and taps
                self._plans.pop(next(iter(self._plans)))
        return plan

    def _kept(self, key: str) -> bytes | None:
        plan = kept_plan(self._path(key)) if self._cache else None
        if plan is None:
            return None
        self._cuda.enter()
        if self._reader.deserialize_cuda_engine(plan) is None:
            log.warning("%s is not of this TensorRT: the engine is built again.", self._path(key))
            return None
        return plan

    def _path(self, key: str) -> Path:
        assert self._cache is not None
        return self._cache / f"{key}.plan"

    def _built(self, key: str, model: bytes, output: str, part: str) -> bytes:
        log.info("Building the TensorRT engine of %s; this is done once and may take minutes.", part)
        self._cuda.enter()
        plan = build_plan(self._trt, self._logger, model, self._recipe_of(part))
        self._prove(plan, model, output, part)
        if self._cache:
            keep_plan(self._path(key), plan)
        return plan

    def _file(self, part: str, activations: tuple[ActivationScale, ...]) -> bytes:
        """The bundle's file, with these activation scales in place of the exported ones."""
        content = self.bundle.read(part)
        graph, table = OnnxGraph(content), self.bundle.norms
        missing = sorted({n for s in self._recipe_of(part).sites for n in s.initialisers} - graph.initialisers())
        if missing:
            raise BundleError(f"{part} of {self.bundle.path} and its norm table disagree about {missing[0]}.", code="damaged")
        if not activations:
            return content
        table.tensors({}, activations)  # refuses what no target could take
        values: dict[str, NDArray[np.generic]] = {}
        for a in activations:
            scale, clamp = symmetric(a, self._recipe.levels.get(a.tensor, 256))
            values[f"{a.tensor}.scale"] = np.asarray(scale)
            values |= {f"{a.tensor}.{end}": np.asarray(v) for end, v in zip(("low", "high"), clamp or (), strict=False)}
        return graph.with_values(values)

    def _prove(self, plan: bytes, model: bytes, output: str, part: str) -> None:
        """Raises BundleError when the plan is not to be used: see the top of this file."""
        recipe, x = self._recipe_of(part), self.bundle.preprocess.apply(self._trial)
        engine = self._engine(plan)
        refittable_weights(self._trt, self._logger, engine, recipe)
        plain = self._engine(build_plan(self._trt, self._logger, model, recipe, refittable=False))
        ours, theirs = (self._answers(e, x, output, part) for e in (engine, plain))
        self._alike(ours, theirs, PLAIN_APART, "an engine that cannot be refitted")
        file = _in_onnx_runtime(model, x)
        self._alike(ours, file, FILE_APART, "the bundle's file in ONNX Runtime")
        states, norms = distant(self.bundle.norms), self.bundle.norms.norms
        values: dict[str, NDArray[np.generic]] = {n: v for s in norms for n, v in file_tensors(s, states[s.name]).items()}
        wanted = _in_onnx_runtime(OnnxGraph(model).with_values(values), x)
        moved = self._engine(plan)
        refit(self._trt, self._logger, moved, self._vectors(states, recipe))
        most = min(FILE_APART, _apart(file, wanted) / 2)
        self._alike(self._answers(moved, x, output, part), wanted, most, "the bundle's file at other norms")

    def _answers(self, engine: CudaEngine, x: F32, output: str, part: str) -> F32:
        return _Floats(self._started(engine, output, part), ServingState(), self.bundle.preprocess).run(x)

    def _alike(self, ours: F32, theirs: F32, most: float, whose: str) -> None:
        apart = _apart(ours, theirs)
        if not apart <= most:
            raise BundleError(
                f"The refittable engine of {self.named} does not answer as {whose}: they are {apart:.2f} of the answers' "
                "spread apart. It is not used: take another target of the bundle, or another version of TensorRT.",
                code="refit-differs",
            )


def distant(table: NormTable, seed: int = 1) -> dict[str, NormState]:
    """Norm states so far from the exported ones that an engine which kept the old would be found out."""
    rng = np.random.default_rng(seed)
    states = {}
    for site in table.norms:
        s = site.exported
        gamma = s.gamma * rng.uniform(0.6, 1.5, s.gamma.shape)
        beta = s.beta + rng.uniform(-0.5, 0.5, s.beta.shape) * np.abs(s.gamma[: len(s.beta)])
        mean = s.mean + rng.uniform(-0.3, 0.3, s.mean.shape) * np.sqrt(s.variance)
        states[site.name] = NormState(*(np.asarray(v, np.float32) for v in (gamma, beta, mean, s.variance)))
    return states


def _apart(ours: F32, theirs: F32) -> float:
    return float(np.sqrt(np.mean((ours.astype(np.float64) - theirs) ** 2)) / max(float(theirs.std()), 1e-12))


def _in_onnx_runtime(model: bytes, x: F32) -> F32:
    """The file as written, operator by operator: no sum saturates."""
    session = ort.InferenceSession(model, session_options(optimise=False), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {INPUT: x[i : i + 1]})[0] for i in range(len(x))])
