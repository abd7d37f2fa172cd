"""Whether there are enough different calibration images for what is concluded from them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from export.diagnose.finding import Finding
from export.diagnose.intervals import interval

__all__ = ["FEWEST", "amount", "distinct"]

FEWEST = 32  # images below which a new one leaves a given activation's range in more than 3 cases of 100


def distinct(images: NDArray[np.uint8]) -> int:
    """How many different images there are among uint8 (N, H, W, 3)."""
    return len({image.tobytes() for image in images})


def amount(images: NDArray[np.uint8]) -> Iterator[Finding]:
    """Of n exchangeable images the next one holds the largest value of an activation with probability 1/(n + 1), whatever the
    distribution (Wilks, "Determination of sample sizes for setting tolerance limits", Ann. Math. Statist. 12, 1941)."""
    count = distinct(images)
    if count >= FEWEST:
        return
    beyond, shown = 1 / (count + 1), interval(count, count)[0]
    same = "" if count == len(images) else f" (of {len(images)}; the others are copies)"
    yield Finding(
        "too-few-images",
        f"There {'is' if count == 1 else 'are'} only {count} different calibration image{'' if count == 1 else 's'}{same}. A "
        f"new image then exceeds the range taken for any one activation with a probability of {beyond:.0%}, and even "
        f"{count} of {count} agreeing answers prove no more than {shown:.0%} agreement (95 % sure). Give 100 to 500.",
        {"images": float(count), "out_of_range": beyond, "agreement_shown": shown},
    )
