"""A device's loop around the adapter, without threads, on a small real bundle."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from small_nets import images

from edge.adapt import HOME, Adapter, AdaptSettings, FrameFeatures, ImageObserver, Reference
from edge.engine import EngineFactory
from edge.serving import ServingState
from edge.statistics import measure_of
from refold import Bundle
from refold.statistics import StatisticsModel

U8 = NDArray[np.uint8]
SETTINGS = AdaptSettings(probe_frames=8, burst=32, images=16, first_images=12, watch_every=1)


def model_of(bundle: Bundle) -> StatisticsModel:
    return StatisticsModel.of(bundle, SETTINGS.mix)


def noisy(pictures: U8) -> U8:
    return np.clip(pictures + np.random.default_rng(5).normal(0, 45, pictures.shape), 0, 255).astype(np.uint8)


def dim(pictures: U8) -> U8:
    return (pictures * 0.25).astype(np.uint8)


class Device:
    """Serves frames one by one as the daemon does, without threads."""

    def __init__(self, bundle: Bundle, factory: EngineFactory, adapter: Adapter | None = None) -> None:
        self.side = bundle.preprocess.height
        self.preprocess = bundle.preprocess
        self.factory = factory
        self.adapter = adapter or Adapter(
            StatisticsModel.of(bundle, SETTINGS.mix),
            SETTINGS,
            bundle.manifest.class_count,
            reference=Reference.measure(images(256, self.side)),
            bundle_digest=bundle.digest,
        )
        measure = measure_of(factory, self.adapter.model, 32)
        assert measure is not None
        self.observer = ImageObserver(self.adapter, measure, self.adapter.model)
        self.serve(ServingState(domain=HOME))
        self.frame = 0
        self.kept = 0
        self.domains: list[str] = []

    def serve(self, serving: ServingState) -> None:
        self.serving = serving
        self.engine = self.factory.build(serving)

    def show(self, pictures: U8) -> None:
        for picture in pictures:
            x = self.preprocess.apply(picture)
            logits = self.engine.run(x)[0].astype(np.float64)
            p = np.exp(logits - logits.max())
            if self.adapter.wants_image(FrameFeatures.of(picture, p / p.sum())):
                self.kept += 1
                serving = self.observer.observe(self.frame, picture, self.serving)
                if serving is not None:
                    self.serve(serving)
            self.frame += 1
            self.domains.append(self.adapter.domain)
