"""Two runtimes of one bundle whose answers differ: by how much, and whether there are images enough to say so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from export.diagnose.finding import Finding
from export.diagnose.intervals import interval

__all__ = ["differing", "images_needed"]


def differing(target: str, other: str, numbers: Mapping[str, float], count: int, least: float) -> Iterator[Finding]:
    """Args:
        numbers: what `export.checks.agree` gave.
        count: images it counted on.
        least: share of them on which both must choose the same class.
    """  # fmt: skip
    same = numbers[f"argmax_{other}"]
    accepted = bool(numbers.get("difference_accepted"))
    if same >= least:
        return
    low, high = interval(round(same * count), count)
    verdict = (
        "accepted by --accept-difference"
        if accepted
        else f"too few images to tell whether they agree on {least:.1%}; with {images_needed(least)} or more it can be told"
    )
    yield Finding(
        "targets-differ",
        f"{target} and {other} choose different classes on {count - round(same * count)} of {count} images (agreement "
        f"{same:.1%}, 95 % interval {low:.1%} to {high:.1%}): {verdict}.",
        {"agreement": same, "agreement_low": low, "agreement_high": high, "images": float(count), "accepted": float(accepted)},
    )


def images_needed(least: float) -> int:
    """How many images must all agree before an agreement of `least` is shown, rounded up to hundreds."""
    count = 100
    while interval(count, count)[0] < least:
        count += 100
    return count
