"""One device with default settings on a stream, frame by frame, beside the exported model frozen."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge.adapt import Adapter, AdaptSettings, FrameFeatures, ImageObserver, Reference
from edge.engine import EngineFactory
from edge.serving import ServingState
from edge.statistics import measure_of
from refold.bundle import Bundle
from refold.statistics import StatisticsModel

__all__ = ["Device", "Run"]

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
TOGETHER = 64  # images of the frozen model's batches


@dataclass
class Run:
    """Attributes:
    adapted, frozen: predictions, int64 (N,).
    swaps: frame numbers from which another state is served, with its domain and whether it holds statistics of the device's.
    """

    adapted: I64
    frozen: I64
    swaps: list[tuple[int, str, bool]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


class Device:
    """A fresh device; `run` may be called for one stream after another without a reset."""

    def __init__(self, bundle: Bundle, settings: AdaptSettings | None = None) -> None:
        self._bundle, settings = bundle, settings or AdaptSettings()
        self._factory = EngineFactory(bundle)
        model = StatisticsModel.of(bundle, settings.mix)
        self.adapter = Adapter(model, settings, int(bundle.manifest.class_count), reference=reference_of(bundle))
        measure = measure_of(self._factory, model, settings.memory_mb)
        assert measure is not None
        self._observer = ImageObserver(self.adapter, measure, model)
        self.serving = ServingState(domain="d0")
        self._frozen = self._engine = self._factory.build(self.serving)
        self._frame = 0

    def run(self, images: U8) -> Run:
        """uint8 (N, H, W, 3). A frame is answered before anything is learnt from it."""
        run = Run(np.empty(len(images), np.int64), self.frozen(images))
        for i, image in enumerate(images):
            logits = self._engine.run_pictures(image[None])[0].astype(np.float64)
            run.adapted[i] = logits.argmax()
            p = np.exp(logits - logits.max())
            if self.adapter.wants_image(FrameFeatures.of(image, p / p.sum())):
                state = self._observer.observe(self._frame, image, self.serving)
                if state is not None:
                    self.serving, self._engine = state, self._factory.build(state)
                    run.swaps.append((self._frame + 1, state.domain, state.overlay))
            self._frame += 1
        run.metrics = self.adapter.metrics()
        return run

    def frozen(self, images: U8) -> I64:
        """What the exported model answers."""
        parts = [self._frozen.run_pictures(images[i : i + TOGETHER]) for i in range(0, len(images), TOGETHER)]
        answers: I64 = np.concatenate(parts).argmax(1).astype(np.int64)
        return answers


def reference_of(bundle: Bundle) -> Reference:
    """How the calibration images look, as the daemon measures it."""
    with np.load(io.BytesIO(bundle.read(bundle.manifest.calibration)), allow_pickle=False) as slice_:
        return Reference.measure(slice_["images"])
