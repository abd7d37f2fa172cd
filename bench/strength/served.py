"""One network and what it answers where a domain's kept images are followed at given strengths, as the device does it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bench.field.device import reference_of
from bench.field.networks import bundle_of
from edge.adapt import Reference
from edge.adapt.kept import KeptImages
from edge.adapt.support import AGREED, supported
from edge.engine import EngineFactory
from edge.serving import ServingState
from edge.statistics import Estimate, estimate, measure_of
from refold.softmax import softmax_rows
from refold.statistics import StatisticsModel

__all__ = ["KEPT", "Served"]

U8 = NDArray[np.uint8]
F64 = NDArray[np.float64]
KEPT = 64  # images a device keeps before it measures all of them
MEMORY_MB = 64


class Served:
    """Attributes:
    sites: norm sites with statistics.
    """

    def __init__(self, network: str) -> None:
        bundle = bundle_of(network)
        self._factory, self._model = EngineFactory(bundle), StatisticsModel.of(bundle)
        measure = measure_of(self._factory, self._model, MEMORY_MB)
        assert measure is not None
        self._measure = measure
        self._reference: Reference = reference_of(bundle)
        self._exported = self._factory.build(ServingState())
        self.sites = len(self._model.layout.sites)

    def exported(self, images: U8) -> F64:
        """Probabilities of the exported model, float64 (N, classes)."""
        return softmax_rows(self._exported.run_pictures(images))

    def worth(self, kept: U8) -> float:
        """Independent images that the kept ones are worth."""
        images = KeptImages(len(kept))
        for i, image in enumerate(kept):
            images.add(i, image)
        return images.worth(self._reference)

    def estimated(self, kept: U8, worth: float, strength: F64) -> Estimate:
        """The device's measurement: six passes."""
        return estimate(self._measure, replace(self._model, strength=strength), ServingState(), list(kept), effective=worth)

    def again(self, kept: U8, worth: float, strength: F64, mix: F64) -> Estimate:
        """One pass at a class mix that is known."""
        expected = self._model.expected(mix, worth)
        moments, logits = self._measure(list(kept), ServingState(), expected, strength, None, 0.0)
        return Estimate(moments, worth, mix, moments, logits)

    def onwards(self, kept: U8, found: Estimate, strength: F64) -> Estimate:
        """From what another strength found, two passes at this one: how a device would try several on the same images."""
        for _ in range(2):
            mix = self._model.class_moments.mix(softmax_rows(found.logits))
            found = self.again(kept, found.frames, strength, mix)
        return found

    def answers(self, found: Estimate, strength: F64, images: U8, *, guarded: bool = True) -> F64:
        """Probabilities behind what was found, float64 (N, classes); of the exported model where there is no shift."""
        model = replace(self._model, strength=strength)
        states, _ = model.served({}, found.moments, found.frames, found.mix)
        if guarded and not supported(model.early(found.moments, found.frames, found.mix), AGREED):
            return self.exported(images)
        return softmax_rows(self._factory.build(ServingState(states, (), 0, "d1", True, "")).run_pictures(images))
