"""Runs a bundle's statistics graph. ONNX Runtime serves every target: the integers are the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.serving import ServingState
from refold.bundle import Bundle
from refold.errors import BundleError, InputError
from refold.norms import ActivationScale
from refold.statistics import INPUTS, OUTPUTS, Expectation, Layout, graph_inputs

__all__ = ["StatisticsGraph"]

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
LEAST_CHUNK = 8  # images: moments of fewer would make a site's statistics too different from those of all
BYTES_PER_INPUT = 64  # of memory for each number of an input image: activations in float32 and ONNX Runtime's copies


class StatisticsGraph:
    """A `Measure` (edge.statistics.estimate). Not thread-safe. The session is opened when first wanted.

    Args:
        bundle: with a statistics graph.
        memory: bytes a run may take; images go through in chunks, each beside the moments of the chunks before it.
        threads: of ONNX Runtime.
        stopped: asked before each chunk; True ends the run with `InterruptedError`.
    """

    def __init__(
        self, bundle: Bundle, layout: Layout, *, memory: int, threads: int = 1, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        self._bundle, self._layout, self._threads, self._stopped = bundle, layout, threads, stopped
        self._session: Any = None
        self._activations: tuple[ActivationScale, ...] = ()
        size = int(np.prod(bundle.preprocess.shape))
        self.chunk = max(memory // (size * BYTES_PER_INPUT), LEAST_CHUNK)

    @staticmethod
    def available(bundle: Bundle) -> bool:
        """Whether the bundle has a graph and ONNX Runtime is installed."""
        return bool(bundle.manifest.statistics) and find_spec("onnxruntime") is not None

    def __call__(
        self, images: Sequence[U8], base: ServingState, expected: Expectation, strength: F64, known: F64 | None,
        share: float,
    ) -> tuple[F64, F32]:  # fmt: skip
        """See `Measure`. Raises BundleError when ONNX Runtime refuses the graph, InputError for moments that are not finite."""
        joined = np.zeros((2, self._layout.channels)) if known is None else known
        counted = share * len(images) / (1 - share) if share < 1 else 0.0
        answers = []
        for first in range(0, len(images), self.chunk):
            if self._stopped():
                raise InterruptedError
            part = images[first : first + self.chunk]
            held = counted / (counted + len(part))
            given = graph_inputs(self._layout, base.states, expected, strength, joined, held)
            moments, logits = self._run(np.stack(part), given, base)
            joined = held * joined + (1 - held) * moments[:2]
            counted += len(part)
            answers.append(logits)
        return joined, np.concatenate(answers)

    def _run(self, images: U8, given: Mapping[str, F32], base: ServingState) -> tuple[F64, F32]:
        session = self._opened(base.activations)
        x = self._bundle.preprocess.apply(images)
        try:
            moments, logits = session.run([OUTPUTS.moments, OUTPUTS.logits], {self._input: x, **given})
        except Exception as e:
            raise BundleError(
                "The statistics graph does not run here; export the model again.", code="statistics", detail=str(e)
            ) from e
        if not (np.isfinite(moments).all() and np.isfinite(logits).all()):
            raise InputError("The kept images' statistics are not finite: they are not used.", code="statistics")
        return moments.astype(np.float64), logits

    def _opened(self, activations: tuple[ActivationScale, ...]) -> Any:
        if self._session is None or activations != self._activations:
            from edge.engine.onnx_graph import OnnxGraph
            from edge.engine.session import open_session, session_options

            model = self._bundle.read(self._bundle.manifest.statistics)
            tensors = self._bundle.norms.tensors(None, activations) | self._bundle.packed_weights()
            wanted = OnnxGraph(model).externals()
            held = {name: tensors[name] for name in wanted if name in tensors}
            self._session = open_session(model, held, session_options(self._threads))
            self._activations = activations
            self._input = next(i.name for i in self._session.get_inputs() if i.name not in INPUTS)
        return self._session
