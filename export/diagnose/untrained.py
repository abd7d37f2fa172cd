"""Whether the norms still hold the values a new layer begins with: the usual trace of weights that were never loaded."""

from __future__ import annotations

from collections.abc import Iterator

from export.diagnose.finding import Finding
from refold.norms import NormSite, NormTable

__all__ = ["untrained"]

NAMED = 3


def untrained(table: NormTable) -> Iterator[Finding]:
    """Training moves every gamma and beta, and running statistics with the first batch: exactly 1, 0, 0 and 1 is no result."""
    sites = table.norms
    initial = [s for s in sites if _initial(s)]
    counted = [s for s in initial if s.kind.has_statistics]
    if initial and len(initial) == len(sites):
        yield Finding(
            "untrained",
            f"All {len(sites)} norms hold the values a new layer begins with (scale 1, shift 0): these are the weights of a "
            "model that was never trained. Was --weights forgotten, or does the callable build the model without loading them?",
            {"initial_norms": float(len(initial)), "norms": float(len(sites))},
        )
    elif counted:
        names = ", ".join(s.name for s in counted[:NAMED]) + (", ..." if len(counted) > NAMED else "")
        yield Finding(
            "untrained",
            f"{len(counted)} of {len(sites)} norms ({names}) hold the values a new layer begins with (scale 1, shift 0, mean "
            "0, variance 1): that part of the model was never trained, or its weights were not loaded.",
            {"initial_norms": float(len(counted)), "norms": float(len(sites))},
        )


def _initial(site: NormSite) -> bool:
    s = site.exported
    plain = bool((s.gamma == 1).all()) and not s.beta.any()
    return plain and (not site.kind.has_statistics or (not s.mean.any() and bool((s.variance == 1).all())))
