"""What happens to one frame, on one thread, in tens of microseconds around the engine's own time.

    picture ─► preprocess ─► engine ─► [corrections] ─► softmax ─► selector ─► [novelty] ─► prediction
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
from edge.adaptation.corrections import Corrector, SecondLook, as_logits
from edge.adaptation.novelty import NOVEL_SCORE, NoveltyGate
from edge.engine import Engine, EngineSlot
from edge.engine.pictures import Scratch
from edge.select import Selector, Verdict, entropy_of
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
    """One answer. `entropy` in nats; `latency_ms` from picture to verdict; `kept`: offered to the outbox; `corrected`: not what
    the engine alone said; `novel`: no domain explains the frame."""

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
    corrected: bool = False
    novel: bool = False


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
        corrector: corrects answers where its evidence supports it; it sees frames, not requests.
        second_look: spends a mirrored image on unsure frames.
        novelty: marks frames that no domain explains; they are kept with a score above all others.
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
        corrector: Corrector | None = None,
        second_look: SecondLook | None = None,
        novelty: NoveltyGate | None = None,
    ) -> None:
        self._preprocess = preprocess
        self._slot = slot
        self.selector = selector
        self._adaptation = adaptation
        self._on_prediction = on_prediction
        self._on_sample = on_sample
        self._corrector, self._second_look, self.novelty = corrector, second_look, novelty
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
        logits = self._run(engine, frame.image)
        if self._second_look is not None:
            logits = self._look_again(self._second_look, engine, frame.image, logits)
        corrected = None
        if self._corrector is not None:
            corrected = self._corrector.answer(logits, self.domain(engine.serving))
        return self.account(frame, logits, engine.serving, started, corrected)

    def _run(self, engine: Engine, image: U8) -> F32:
        if image.shape != self._shape or image.dtype is not BYTES or not image.flags.c_contiguous:
            logits = engine.run(self._preprocess.apply(image))
        elif engine.pictures is not None:
            logits = engine.pictures.run(image, self._scratch)
        else:
            self._preprocess.fill(image, self._planes)
            logits = engine.run(self._x)
        row: F32 = logits[0]
        return row

    def _look_again(self, second_look: SecondLook, engine: Engine, image: U8, logits: F32) -> F32:
        first, _, entropy = softmax(logits)
        if not second_look.wants(entropy):
            return logits
        mirrored, _, _ = softmax(self._run(engine, np.ascontiguousarray(image[:, ::-1])))
        normaliser = float(logits.max()) - math.log(float(first.max()))  # ln Σ exp of the first look: the average gets it too
        averaged: F32 = as_logits(second_look.average(first, mirrored)) + np.float32(normaliser)
        return averaged

    def domain(self, serving: ServingState) -> str:
        """The present domain's name: the adaptation's word, else that of what is served."""
        return self._adaptation.domain if self._adaptation is not None else serving.domain

    def account(
        self, frame: Frame, logits: F32, serving: ServingState, started: float, corrected: F32 | None = None
    ) -> Prediction:
        """Everything after the engine, for an answer wherever it was computed.

        Args:
            logits: float32 (classes,), the engine's own.
            corrected: probabilities float32 (classes,) where the answer was corrected.
        """
        probabilities, index, entropy = softmax(logits)
        own, own_index, own_entropy = probabilities, index, entropy
        if corrected is not None:
            probabilities, index, entropy = corrected, int(corrected.argmax()), entropy_of(corrected)
        kept = False
        if self.selector is not None:
            plain = corrected is None or self._corrector is None or not self._corrector.calibrated
            verdict = self.selector.judge(own, own_entropy) if plain else self.selector.judge(probabilities, entropy)
            kept = verdict.keep
        novel = False
        if self.novelty is not None:
            novel, offered = self.novelty.look(frame.image, logits, self.domain(serving))
            if self.selector is not None and offered and not verdict.unbiased:
                verdict, kept = Verdict(True, NOVEL_SCORE, verdict.entropy, "novel"), True
        latency = (time.perf_counter() - started) * 1e3  # before the adaptation, which a replayed frame waits for
        adaptation = self._adaptation
        if adaptation is not None:
            adaptation.watch(frame.number, frame.image, own_entropy, own_index)
            domain = adaptation.domain
        else:
            domain = serving.domain
        prediction = Prediction(
            frame.number, frame.unix_ms, frame.name, index, float(probabilities[index]), entropy,
            serving.release_version, domain, serving.overlay, kept, latency, corrected is not None, novel,
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
        parts = (self._corrector, self._second_look, self.novelty)
        return {
            **{name: value for part in parts if part is not None for name, value in part.metrics().items()},
            "frames": float(self.frames),
            "samples_kept": float(self.kept),
            "samples_dropped": float(self.samples_dropped),
            "entropy_mean": self.entropy if math.isfinite(self.entropy) else 0.0,
            "latency_p50_ms": float(seen[len(seen) // 2]),
            "latency_p99_ms": float(seen[min(len(seen) * 99 // 100, len(seen) - 1)]),
        }
