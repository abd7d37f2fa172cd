"""What the taps have seen of one domain: first and second moments of every norm's input, and how many frames they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from refold.errors import InputError
from refold.norms import NormSite, NormState, NormTable, unfold_moments

__all__ = ["Evidence", "TapLayout"]

F64 = NDArray[np.float64]


class TapLayout:
    """Where each site's channels sit in a tap model's concatenated output: sites with statistics, in execution order."""

    def __init__(self, table: NormTable) -> None:
        self.sites: tuple[NormSite, ...] = tuple(s for s in table.norms if s.kind.has_statistics)
        edges = np.cumsum([0, *(s.channels for s in self.sites)])
        self.slices = tuple(slice(int(a), int(b)) for a, b in itertools.pairwise(edges))
        self.channels = int(edges[-1])

    def unfold(self, moments: NDArray[np.float32], states: Mapping[str, NormState]) -> F64:
        """Moments of every norm's input, float64 (2, channels): mean and mean square.

        Args:
            moments: a tap model's output for one frame, float32 (2, channels).
            states: what the tap model ran with; sites left out ran as exported.

        Raises:
            InputError: another shape, or a value that is not finite.
        """
        if moments.shape != (2, self.channels):
            raise InputError(
                f"The tap model gave moments of shape {moments.shape}; this bundle has (2, {self.channels}): they belong to "
                "different models.",
                code="taps",
            )
        if not np.isfinite(moments).all():
            raise InputError("The tap model gave moments that are not finite: the frame is not counted.", code="taps")
        out = np.empty((2, self.channels))
        for site, cut in zip(self.sites, self.slices, strict=True):
            mean, variance = unfold_moments(site, states.get(site.name, site.exported), moments[0, cut], moments[1, cut])
            out[0, cut] = mean
            out[1, cut] = variance.astype(np.float64) + mean.astype(np.float64) ** 2
        return out


class Evidence:
    """Running moments of one domain, float64 (2, channels), with the number of frames they are worth."""

    def __init__(self, channels: int) -> None:
        self.frames = 0.0
        self.moments: F64 = np.zeros((2, channels))

    def add(self, moments: F64, *, frames: float = 1.0, limit: float = np.inf) -> None:
        """Adds frames; beyond `limit` the oldest fade."""
        self.frames = min(self.frames, limit - frames)
        self.moments += (moments - self.moments) * (frames / (self.frames + frames))
        self.frames += frames

    def copy(self) -> Evidence:
        """The same, to go its own way."""
        other = Evidence(self.moments.shape[1])
        other.frames, other.moments = self.frames, self.moments.copy()
        return other

    def fade(self, keep: float) -> None:
        """The same moments, worth fewer frames."""
        self.frames *= keep

    @property
    def mean(self) -> F64:
        mean: F64 = self.moments[0]
        return mean

    @property
    def variance(self) -> F64:
        variance: F64 = np.maximum(self.moments[1] - self.moments[0] ** 2, 0.0)
        return variance
