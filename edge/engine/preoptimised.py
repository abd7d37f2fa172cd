"""A model's graph after ONNX Runtime's optimiser, kept on disk: an engine is then built in 4 ms instead of 10 (ResNet-20).

The optimiser is a function of the values it sees, so its result may serve other values only where that was shown to change
nothing. `prepare` optimises at the exported state, takes the adaptable tensors out again, and compares engines from both graphs
bit for bit at disturbed norms and at disturbed activation scales; what does not agree is never used. A release that moves a
zero point always takes the original graph: whether a ReLU disappears into a scale depends on it.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge.engine.onnx_graph import OnnxGraph
from edge.engine.session import open_session, session_options
from refold.atomic import make_directory, write_atomically
from refold.errors import BundleError, StorageError
from refold.norms import ActivationScale, NormState, NormTable

__all__ = ["Graph", "Scope", "disturbed", "prepare"]

log = logging.getLogger(__name__)
SHARING = "ConstantSharing"  # would merge scales that are equal today
DIGEST = 32
Packed = Callable[[], dict[str, NDArray[np.int8]]]


class Scope(Enum):
    """For which changes the optimised graph was found exact."""

    NOTHING = 0
    NORMS = 1
    NORMS_AND_SCALES = 2


@dataclass(frozen=True)
class Graph:
    """A model's original and optimised bytes, with the tensors each wants.

    Attributes:
        packed: expands the integers the original leaves out; the optimised graph holds them.
    """

    original: bytes
    optimised: bytes
    scope: Scope
    wanted: frozenset[str]
    operators: dict[str, int]
    packed: Packed

    def open(
        self, table: NormTable, states: dict[str, NormState], activations: tuple[ActivationScale, ...], threads: int
    ) -> ort.InferenceSession:
        """A session at the given state. Raises NormStateError or BundleError."""
        tensors = table.tensors(states, activations)
        if self._fits(table, activations):
            some = {name: value for name, value in tensors.items() if name in self.wanted}
            return open_session(self.optimised, some, session_options(threads, optimise=False))
        original = OnnxGraph(self.original).without_idle_clips(tensors)
        return open_session(original, tensors | self.packed(), session_options(threads))

    def open_codes(
        self,
        model: bytes,
        table: NormTable,
        states: dict[str, NormState],
        activations: tuple[ActivationScale, ...],
        threads: int,
    ) -> ort.InferenceSession | None:
        """As `open`, for a model made of the optimised graph; None where that graph is not to be used at this state."""
        if not self._fits(table, activations):
            return None
        some = {name: value for name, value in table.tensors(states, activations).items() if name in self.wanted}
        return open_session(model, some, session_options(threads, optimise=False))

    def _fits(self, table: NormTable, activations: tuple[ActivationScale, ...]) -> bool:
        if not activations or self.scope is Scope.NOTHING:
            return self.scope is not Scope.NOTHING
        zero_points = {a.tensor: a.zero_point for a in table.activations}
        return self.scope is Scope.NORMS_AND_SCALES and all(zero_points[a.tensor] == a.zero_point for a in activations)


def prepare(
    model: bytes, table: NormTable, shape: tuple[int, ...], cached: Path | None, packed: Packed = dict[str, NDArray[np.int8]]
) -> Graph:
    """Optimises `model` (or reads what an earlier start left at `cached`) and finds out what the result may be used for.

    Args:
        model: ONNX bytes with the adaptable tensors external.
        shape: of one input, (3, H, W).
        packed: expands the integers that are not in `model`.
        cached: where to keep it; None: in memory only. A damaged file is replaced; a full disk only costs the next start.
    """
    known = _read(cached) if cached else None
    if known is None:
        known = _optimise(model, table, shape, packed)
        if cached:
            _write(cached, *known)
    scope, optimised = known
    graph = OnnxGraph(optimised)
    wanted = frozenset(graph.externals())
    return Graph(model, optimised, scope, wanted, dict(graph.operators()), packed)


def disturbed(table: NormTable, seed: int = 1) -> tuple[dict[str, NormState], tuple[ActivationScale, ...]]:
    """Norm states and activation scales a few percent off the exported ones, every number by another amount."""
    rng = np.random.default_rng(seed)

    def near(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return (values * rng.uniform(0.97, 1.03, values.shape)).astype(np.float32)

    states = {}
    for site in table.norms:
        s = site.exported
        states[site.name] = NormState(near(s.gamma), near(s.beta), near(s.mean), near(s.variance))
    scales = tuple(replace(a, scale=float(np.float32(a.scale * rng.uniform(0.97, 1.03)))) for a in table.activations)
    return states, scales


def _optimise(model: bytes, table: NormTable, shape: tuple[int, ...], packed: Packed) -> tuple[Scope, bytes]:
    try:
        with tempfile.TemporaryDirectory(prefix="refold-", ignore_cleanup_errors=True) as scratch:
            path = Path(scratch) / "optimised.onnx"
            options = session_options()
            options.optimized_model_filepath = str(path)
            open_session(model, table.tensors() | packed(), options, disabled_optimizers=[SHARING])
            content = path.read_bytes()
    except (OSError, BundleError) as e:
        if isinstance(e, BundleError):  # ONNX Runtime says the same of a disk without room and of a model that does not open
            open_session(model, table.tensors() | packed(), session_options())
        log.warning("The optimised graph cannot be made (%s): engines are built from the original.", _reason(e))
        return Scope.NOTHING, model
    graph = OnnxGraph(content)
    content = graph.with_external(graph.initialisers() & set(table.tensors()))
    wanted = frozenset(OnnxGraph(content).externals())
    x = np.random.default_rng(0).normal(0, 1, (2, *shape)).astype(np.float32)
    states, scales = disturbed(table)
    scope = Scope.NOTHING
    for candidate, with_scales in ((Scope.NORMS, ()), (Scope.NORMS_AND_SCALES, scales)):
        try:
            ours, theirs = (
                Graph(model, content, s, wanted, {}, packed).open(table, states, with_scales, 1).run(None, {"input": x})[0]
                for s in (candidate, Scope.NOTHING)
            )
        except BundleError as e:
            log.warning("The optimised graph does not open again (%s): engines are built from the original.", e.detail or e)
            break
        if not np.array_equal(ours, theirs):
            break
        scope = candidate
    if scope is Scope.NOTHING:
        log.warning("The optimised graph is not exact at other norms: engines are built from the original, a little slower.")
    return scope, content


def _reason(e: OSError | BundleError) -> str:
    return e.detail if isinstance(e, BundleError) and e.detail else str(e)


def _read(path: Path) -> tuple[Scope, bytes] | None:
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    if len(stored) <= DIGEST or hashlib.sha256(stored[DIGEST:]).digest() != stored[:DIGEST]:
        log.warning("%s is damaged: made again.", path)
        return None
    return Scope(stored[DIGEST]), stored[DIGEST + 1 :]


def _write(path: Path, scope: Scope, content: bytes) -> None:
    body = bytes([scope.value]) + content
    try:
        make_directory(path.parent)
        write_atomically(path, [hashlib.sha256(body).digest(), body])
    except (StorageError, OSError) as e:
        log.warning("The optimised graph is not kept: %s", e)
