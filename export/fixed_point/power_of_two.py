"""What it costs to round the folded scales 2**-FL * |gamma| / sigma to powers of two, for targets that shift.

By default nothing is rounded: the folded scale is a float32 number for each channel, exact, and engines multiply by it. A
target without multipliers behind its accumulators takes the option; `refold.norms` then rounds at export and at every
refolding on the device alike, and this module says by how much. A training that is told so (`Settings.power_of_two`) sees the
rounding and learns around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refold.errors import ModelError
from refold.norms import FoldedAffine, NormKind, NormSite, NormState, NormTable, refold

__all__ = ["SiteError", "scale_errors", "shifts"]


@dataclass(frozen=True)
class SiteError:
    """Relative error of one site's folded scales: the largest and the root mean square over its channels."""

    site: str
    largest: float
    rms: float


def scale_errors(table: NormTable, states: Mapping[str, NormState] | None = None) -> tuple[SiteError, ...]:
    """Of every folded site, in execution order. Channels dead at export count as exact: nothing of them is seen.

    Args:
        states: by site name; sites left out are as exported.
    """
    states = states or {}
    return tuple(_error(site, states.get(site.name, site.exported)) for site in table.sites if site.kind is NormKind.FOLDED)


def _error(site: NormSite, state: NormState) -> SiteError:
    a = np.abs(state.gamma.astype(np.float64)) / np.sqrt(state.variance.astype(np.float64) + float(np.float32(site.epsilon)))
    exact = site.weight_scale.astype(np.float64) * a
    folded = refold(site, state)
    assert isinstance(folded, FoldedAffine)
    live = exact > site.scale_floor
    relative = np.abs(folded.weight_scale[live] / exact[live] - 1)
    return SiteError(site.name, float(relative.max(initial=0.0)), float(np.sqrt(np.mean(relative**2))) if live.any() else 0.0)


def shifts(site: NormSite, state: NormState, input_scale: float, output_scale: float) -> NDArray[np.int64]:
    """Bits by which an accumulator of each channel is shifted left (negative: right) to become an output code.

    Raises:
        ModelError: input scale, output scale or a folded scale is no power of two.
    """
    folded = refold(site, state, input_scale)
    assert isinstance(folded, FoldedAffine)
    factor = np.float64(input_scale) * folded.weight_scale.astype(np.float64) / np.float64(output_scale)
    mantissa, exponent = np.frexp(factor)
    if not (mantissa == 0.5).all():
        raise ModelError(f"{site.name} has a scale that is no power of two: it cannot be run by shifts.", code="not-shifts")
    return np.asarray(exponent - 1, np.int64)
