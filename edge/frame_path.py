"""What happens to one frame, on one thread, in tens of microseconds around the engine's own time.

    picture ─► preprocess ─► engine ─► softmax ─► selector ─► prediction
                                                     │ kept       └► detector: taps wanted? ─► worker
                                                     └► worker: encode, outbox

Nothing here waits for a disk, a network, a lock or another thread; whatever might is offered to a worker and dropped, counted,
when that is behind. Frames are never dropped here.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.adaptation import Adaptation
from edge.engine import EngineSlot
from edge.engine.pictures import Scratch
from edge.select import Selector, Verdict
from edge.serving import ServingState
from edge.softmax import softmax
from refold.preprocess import Preprocess

__all__ = ["Frame", "FramePath", "Prediction"]

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
BYTES = np.dtype(np.uint8)
KEPT_LATENCIES = 4096  # behind p50 and p99: some seconds of a fast net, a minute of a slow one


class Frame(NamedTuple):
    """One picture as the model takes it. `image`: uint8 (height, width, 3), never changed afterwards; `name`: its origin."""

    number: int
    image: U8
    name: str
    unix_ms: int


class Prediction(NamedTuple):
    """One answer. `entropy` in nats; `latency_ms` from picture to verdict; `kept`: offered to the outbox."""

    frame: int
    unix_ms: int
    source: str
    predicted: int
    probability: float
    entropy: float
    release_version: int
    domain: str
    overlay: bool
    kept: bool
    latency_ms: float


Sample = Callable[[Frame, Verdict, Prediction], bool]


class FramePath:
    """One device's frames, one after the other.

    Args:
        preprocess: the bundle's.
        slot: read once per frame.
        selector: None keeps nothing.
        adaptation: None serves releases only.
        on_prediction: called with every prediction; must return at once.
        on_sample: called with what the selector kept; False when there was no room.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        slot: EngineSlot,
        *,
        selector: Selector | None = None,
        adaptation: Adaptation | None = None,
        on_prediction: Callable[[Prediction], None] | None = None,
        on_sample: Sample | None = None,
    ) -> None:
        self._preprocess = preprocess
        self._slot = slot
        self.selector = selector
        self._adaptation = adaptation
        self._on_prediction = on_prediction
        self._on_sample = on_sample
        self._x = np.empty((1, 3, preprocess.height, preprocess.width), np.float32)
        self._planes = self._x[0]
        self._scratch = Scratch(preprocess.height, preprocess.width)
        self._shape = preprocess.shape
        self._latencies = array("d", bytes(8 * KEPT_LATENCIES))
        self.frames = self.kept = self.samples_dropped = 0
        self.entropy = 0.0

    def step(self, frame: Frame) -> Prediction:
        """Serves one frame.

        Raises:
            InputError: the picture is not of the model's size; it is not counted as a frame.
        """
        started = time.perf_counter()
        engine = self._slot.current
        image = frame.image
        if image.shape != self._shape or image.dtype is not BYTES or not image.flags.c_contiguous:
            logits = engine.run(self._preprocess.apply(image))
        elif engine.pictures is not None:
            logits = engine.pictures.run(image, self._scratch)
        else:
            self._preprocess.fill(image, self._planes)
            logits = engine.run(self._x)
        return self.account(frame, logits[0], engine.serving, started)

    def account(self, frame: Frame, logits: F32, serving: ServingState, started: float) -> Prediction:
        """Everything after the engine, for an answer wherever it was computed. logits: float32 (classes,)."""
        probabilities, index, entropy = softmax(logits)
        kept = False
        if self.selector is not None:
            verdict = self.selector.judge(probabilities, entropy)
            kept = verdict.keep
        latency = (time.perf_counter() - started) * 1e3  # before the adaptation, which a replayed frame waits for
        adaptation = self._adaptation
        if adaptation is not None:
            adaptation.watch(frame.number, frame.image, entropy, index)
            domain = adaptation.domain
        else:
            domain = serving.domain
        prediction = Prediction(
            frame.number, frame.unix_ms, frame.name, index, float(probabilities[index]), entropy,
            serving.release_version, domain, serving.overlay, kept, latency,
        )  # fmt: skip
        self._latencies[self.frames % KEPT_LATENCIES] = latency
        self.frames += 1
        self.entropy += (entropy - self.entropy) * (0.01 if self.frames > 100 else 1 / self.frames)
        if self._on_prediction is not None:
            self._on_prediction(prediction)
        if kept and self._on_sample is not None:
            if self._on_sample(frame, verdict, prediction):
                self.kept += 1
            else:
                self.samples_dropped += 1
        return prediction

    def metrics(self) -> dict[str, float]:
        """Counters and latencies in milliseconds; any thread."""
        seen = np.sort(np.frombuffer(self._latencies, np.float64)[: max(min(self.frames, KEPT_LATENCIES), 1)])
        return {
            "frames": float(self.frames),
            "samples_kept": float(self.kept),
            "samples_dropped": float(self.samples_dropped),
            "entropy_mean": self.entropy if math.isfinite(self.entropy) else 0.0,
            "latency_p50_ms": float(seen[len(seen) // 2]),
            "latency_p99_ms": float(seen[min(len(seen) * 99 // 100, len(seen) - 1)]),
        }
