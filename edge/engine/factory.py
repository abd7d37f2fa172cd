"""Builds engines of one bundle: chooses the target and its runtime, and lets every new engine prove itself before it serves.

What is particular to a runtime is behind `edge.engine.engine.Runtime`; a runtime's package is imported when a bundle wants it.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from edge.engine.engine import Engine, Runtime, TapEngine
from edge.engine.target import choose_target, require, runtime_name
from edge.serving import ServingState
from refold.bundle import Bundle
from refold.errors import BundleError, GateError

__all__ = ["EngineFactory"]

log = logging.getLogger(__name__)
CANARIES = 4  # pictures a new engine must answer sensibly before it serves


class EngineFactory:
    """Engines of one target of one bundle.

    Args:
        bundle: opened; the parts used are read and checked against their digests here.
        target: name, or None for the one that suits this machine.
        threads: of each engine; 1 leaves the other cores to the device's own work.
        cache: directory for optimised graphs and compiled engines, kept across restarts; None keeps them in memory.

    Attributes:
        integer_layers, expected_integer_layers: layers that run in integers here, and those that did where the bundle was made;
            fewer is slower and is said aloud.

    Raises:
        BundleError: nothing for this machine, a damaged part, a model that does not match the bundle's norm table, or a runtime
            that is not installed.
    """

    def __init__(self, bundle: Bundle, target: str | None = None, *, threads: int = 1, cache: Path | None = None) -> None:
        self.bundle = bundle
        self.target = choose_target(bundle, target)
        self.threads = threads
        self.input_name = bundle.manifest.input_name or "input"
        self.runtime = self._opened(cache)
        self._distinguishes: bool | None = None
        self.integer_layers = self.runtime.integer_layers
        self.expected_integer_layers = sum(layer.runs_in == "int8" for layer in bundle.manifest.layers)
        if self.integer_layers < self.expected_integer_layers:
            log.warning(
                "Only %d of %d integer layers of %s run in integers with %s; the others are 2 to 3 times slower.",
                self.integer_layers, self.expected_integer_layers, bundle.path.name, self.runtime.named,
            )  # fmt: skip

    def _opened(self, cache: Path | None) -> Runtime:
        require(self.target)
        if runtime_name(self.target) == "litert":
            from edge.engine.litert import LiteRtRuntime

            return LiteRtRuntime(self.bundle, self.target, threads=self.threads)
        if runtime_name(self.target) == "tensorrt":
            from edge.engine.tensorrt import TensorRtRuntime

            return TensorRtRuntime(self.bundle, self.target, self._canary_pictures(), cache=cache)
        from edge.engine.ort import OrtRuntime

        return OrtRuntime(self.bundle, self.target, self._canary_pictures(), threads=self.threads, cache=cache)

    def build(self, serving: ServingState) -> Engine:
        """Raises NormStateError when the state does not fit the bundle (admit it first), BundleError when it cannot be run."""
        return self.runtime.build(serving)

    def build_taps(self, serving: ServingState) -> TapEngine:
        """The tap twin at the same state. Raises as `build`, and BundleError when the bundle has no tap model."""
        part = self.bundle.target(self.target).taps
        if not part:
            raise BundleError(f"Target {self.target} of {self.bundle.path} has no tap model.", code="no-taps")
        return self.runtime.build_taps(serving, part)

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
