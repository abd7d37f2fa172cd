"""From frames to evidence: keeps images of the present domain, and has them measured when the adapter wants it.

    image ─► kept ─► enough? ─► estimate (edge.statistics): all of them at once ─► do mirrored views agree more behind it?
          ─► the adapter ─► a state to serve

Until the first measurement the exported state or a release is served: a state in between never is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge.adapt.adapter import Adapter
from edge.adapt.kept import KeptImages, blind
from edge.adapt.support import Change, change_of_answers
from edge.serving import ServingState
from edge.statistics import Estimate, Measure, estimate
from refold.statistics import StatisticsModel

__all__ = ["ImageObserver", "StoppedError"]

U8 = NDArray[np.uint8]
LEAST = 8  # images kept, however large they are
LEAST_WORTH = (
    4.0  # independent images below which nothing is made of a set: a still camera, a lens cap, a sensor that alternates
)


class StoppedError(Exception):
    """The observer was stopped in the middle of a measurement."""


class ImageObserver:
    """The way from an image to the adapter's evidence. Not thread-safe, as the adapter is not.

    Args:
        adapter: asked and told.
        measure: one pass over images behind statistics made in the same pass; raises InterruptedError when stopped.
        model: the bundle's statistics model.
    """

    def __init__(self, adapter: Adapter, measure: Measure, model: StatisticsModel) -> None:
        self._adapter, self._measure, self._model = adapter, measure, model
        self._kept: KeptImages | None = None
        self._reported = 0
        self._domain = adapter.domain
        self.passes = 0
        self.stopped = False  # set by another thread: a measurement ends early

    def observe(self, frame: int, image: U8, served: ServingState) -> ServingState | None:
        """Takes one image, uint8 (H, W, 3); a state to serve from now on, or None to go on with `served`.

        Raises:
            StoppedError: `stopped` was set.
            InputError: the moments are not finite.
            BundleError: the statistics graph cannot be run.
        """
        state = self._adapter.recalled(served)
        if state is not None:
            return state
        if blind(image):
            self._adapter.blinded()
            return None
        kept = self._kept_of(image)
        if not kept.add(frame, image) or not self._adapter.wants_measured(len(kept), kept.limit):
            return None
        return self._measured(kept, served)

    def _kept_of(self, image: U8) -> KeptImages:
        """The present domain's images; those of another, or of a set that was measured, are let go."""
        settings = self._adapter.settings
        if self._kept is None or self._kept.limit > settings.images:
            room = settings.memory_mb * 2**20 // max(2 * image.nbytes, 1)
            self._kept = KeptImages(min(settings.images, max(room, LEAST)))
        if self._adapter.domain != self._domain or self._kept.full:
            self._domain = self._adapter.domain
            self._kept.clear()
            self._reported = 0
        return self._kept

    def _measured(self, kept: KeptImages, served: ServingState) -> ServingState | None:
        adapter, images, worth = self._adapter, kept.images, kept.worth(self._adapter.reference)
        if worth < LEAST_WORTH:
            adapter.skipped()
            return None
        try:
            found = estimate(self._measure, self._model, adapter.base, images, effective=worth, known=adapter.known)
            change = self._change(found, images)
        except InterruptedError:
            raise StoppedError from None
        self.passes += 1
        fresh, frames = len(images) - self._reported, kept.frames(self._reported)
        self._reported = len(images)
        return adapter.measured(found, frames, fresh, served, change=change, whole=kept.full)

    def _change(self, found: Estimate, images: list[U8]) -> Change:
        """No change where the images are not asked."""
        pair = self._adapter.candidate(found)
        return change_of_answers(self._measure, self._model, *pair, images) if pair is not None else Change()
