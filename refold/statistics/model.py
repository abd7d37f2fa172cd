"""A bundle's statistics model: layout, class moments and how far each site goes. Makes served statistics of moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refold.bundle import Bundle
from refold.norms import NormState, NormTable
from refold.statistics.belief import believed
from refold.statistics.class_moments import ASSUMED_SPREAD, ClassMoments
from refold.statistics.expectation import Expectation, expectation
from refold.statistics.layout import Layout
from refold.statistics.posterior import differences, posterior, served_states

__all__ = ["CONCENTRATION", "CONCENTRATIONS", "StatisticsModel"]

F64 = NDArray[np.float64]
# Images a class mix counts for, pass after pass: it begins flat and doubtful.
CONCENTRATIONS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
CONCENTRATION = CONCENTRATIONS[-1]
TOLD = CONCENTRATIONS[2]  # from here on answers are behind a correction
EARLY = 3  # a third: classes move the first norms least
AS_OF = 64.0  # images
WITHOUT_CLASSES = 0.3  # how far to go where nothing tells a class mix from a shift: older bundles


@dataclass(frozen=True, eq=False)
class StatisticsModel:
    """Attributes:
    layout: sites with statistics.
    class_moments: of the bundle.
    strength: float64 (sites,), 0..1: how much of a shift is followed.
    """

    layout: Layout
    class_moments: ClassMoments
    strength: F64

    @classmethod
    def of(cls, bundle: Bundle, strength: float = 1.0) -> StatisticsModel:
        """Of a bundle. Raises BundleError when its class moments are damaged."""
        layout = Layout(bundle.norms)
        mean, variance = layout.row("mean", {}), layout.row("variance", {})
        classes = int(bundle.manifest.class_count)
        if not bundle.manifest.class_moments:
            return cls.without_classes(bundle.norms, classes, strength * WITHOUT_CLASSES)
        moments = ClassMoments.from_bytes(bundle.read(bundle.manifest.class_moments), mean, variance, classes)
        return cls(layout, moments, np.full(len(layout.sites), strength))

    @classmethod
    def without_classes(cls, table: NormTable, classes: int, strength: float = WITHOUT_CLASSES) -> StatisticsModel:
        """A model in which all classes look alike."""
        layout = Layout(table)
        mean, variance = layout.row("mean", {}), layout.row("variance", {})
        spread = np.full((1, layout.channels), ASSUMED_SPREAD)
        held = (mean[None], np.maximum(variance, 1e-12)[None], 0.05 * variance[None], spread)
        one = ClassMoments(np.ones((classes, 1)), *held, np.zeros(1))
        return cls(layout, one, np.full(len(layout.sites), strength))

    def expected(self, mix: F64, frames: float, concentration: float = CONCENTRATION) -> Expectation:
        """What is expected of `frames` images whose answers speak of a class mix. It is trusted like a sample of
        `concentration` images; the first rounds' answers say nothing of the calibration images' mix yet.
        """
        mix = believed(self.class_moments, mix) if concentration >= TOLD else mix
        return expectation(self.class_moments, self.layout, mix, min(concentration, max(frames, 1.0)), frames)

    def served(self, base: Mapping[str, NormState], moments: F64, frames: float, mix: F64) -> tuple[dict[str, NormState], F64]:
        """(states to serve, share of each site that is a shift), inside the trust region.

        Args:
            base: what the statistics are a change to, by site name; sites left out are as exported.
            moments: observed mean and mean square, float64 (2, channels).
            frames: independent images behind them.
            mix: their class mix, float64 (K,).
        """
        layout = self.layout
        variance = np.maximum(moments[1] - moments[0] ** 2, 0.0)
        found = posterior(
            layout, self.expected(mix, frames), moments[0], variance, layout.row("mean", base), layout.row("variance", base),
            self.strength,
        )  # fmt: skip
        return served_states(layout, base, found), found.share

    def early(self, moments: F64, frames: float, mix: F64) -> float:
        """How much of what the first norms see no mix of classes explains, 0..1. Pixels decide them, and classes hardly.

        In units of what mix and chance would explain in `AS_OF` images: more images make a shift more certain, not larger.

        Args:
            moments, frames, mix: as of `served`.
        """
        sites = self.layout.slices[: max(len(self.layout.slices) // EARLY, 1)]
        if not sites:
            return 0.0
        if self.class_moments.count == 1:
            return 1.0  # without classes nothing is explained, and nothing is told
        here, unit = self.expected(mix, frames), self.expected(mix, AS_OF)
        variance = np.maximum(moments[1] - moments[0] ** 2, 0.0)
        shares = []
        for i, cut in enumerate(sites):
            means, variances = differences(here, cut, moments[0][cut], variance[cut])
            parts = (here.means, unit.means, means), (here.variances, unit.variances, variances)
            sizes = [(held.excess(i, d), float(of.explained[i])) for held, of, d in parts]
            shares.append(max(excess / (excess + explained) for excess, explained in sizes))
        return float(np.mean(shares))
