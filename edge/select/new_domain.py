"""More uploads early: the first frames of a new domain go up at a higher rate, chosen at random, before the selector rules.

A cloud can train a domain, and tell whether the outcome helps, only with a hundred or so samples of it; at five uploads per
hundred frames that is thousands of frames of serving what could be better. So a new domain gets a quota of frames chosen
whatever the model thinks of them (they are its population: statistics, teachers and the release gate need such a sample,
docs/adr/016-first-release.md), as far as the hour's bytes go; the selector's own choices come on top.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from edge.select.budget import UNBIASED_SCORE
from edge.select.verdict import Probabilities, Selector, Verdict
from refold.errors import UsageError

__all__ = ["NewDomain", "NewDomainSelector", "innermost"]

REMEMBERED = 256  # domains whose quotas are counted; a device's bank keeps 16


@dataclass(frozen=True)
class NewDomain:
    """Numbers of the quota.

    Attributes:
        uploads: frames of a new domain kept beyond the selector's own; 0 switches the quota off.
        rate: kept per frame until then, 0 to 1.
        steady: frames a domain must have lasted: an alarm that was none is over by then (`AdaptSettings.probe_frames`).
        home: the domain of the export, which is not new.
        seed: of the random choice.
    """

    uploads: int = 384
    rate: float = 0.5
    steady: int = 24
    home: str = "d0"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1 or min(self.uploads, self.steady) < 0:
            raise UsageError("The quota of a new domain needs a rate from 0 to 1 and counts of at least 0.")


class NewDomainSelector:
    """Wraps a selector; a `Selector` itself. Not thread-safe, but `allow` may be called from any thread.

    Args:
        inner: the selector whose verdicts hold outside the quota; it sees every frame.
        domain: the present domain's name.
        known: domains that were met before (a restart): they are not new.
    """

    def __init__(self, inner: Selector, settings: NewDomain, domain: Callable[[], str], known: Iterable[str] = ()) -> None:
        self.inner, self.settings = inner, settings
        self._domain = domain
        self._random = random.Random(settings.seed)
        self._kept = dict.fromkeys(known, settings.uploads)
        self._present, self._stayed = "", 0
        self._room = math.inf

    @property
    def kept(self) -> int:
        """Frames kept by the quota of the present domain."""
        return self._kept.get(self._present, 0)

    def allow(self, samples: float) -> None:
        """How many more samples the hour's bytes can carry; from now on the quota keeps no more than these."""
        self._room = samples

    def judge(self, probs: Probabilities, entropy: float | None = None) -> Verdict:
        verdict = self.inner.judge(probs, entropy)
        name = self._domain()
        if name != self._present:
            self._present, self._stayed = name, 0
        self._stayed += 1
        taken = self._kept.get(name, 0)
        wanted = name != self.settings.home and self._stayed > self.settings.steady and taken < self.settings.uploads
        if not wanted or self._room < 1 or not math.isfinite(verdict.entropy) or self._random.random() >= self.settings.rate:
            return verdict
        self._room -= 1
        self._kept.pop(name, None)
        self._kept[name] = taken + 1
        while len(self._kept) > REMEMBERED:
            del self._kept[next(iter(self._kept))]
        return Verdict(True, UNBIASED_SCORE, verdict.entropy, "new-domain", True)


def innermost(selector: Selector | None) -> Selector | None:
    """The selector whose own verdicts hold outside every quota."""
    while isinstance(selector, NewDomainSelector):
        selector = selector.inner
    return selector
