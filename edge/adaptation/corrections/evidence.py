"""The switch: do the classes a device predicts come in runs? A permutation test, without labels.

Of the stream's last N predicted classes (N_g of group g) the newest n (n_g of group g) are compared with all. Were the order
of the N chance, the newest n would be a draw without replacement, whatever the class mix: a stream of one class, a skewed one,
and a network that answers one class for everything explain themselves. The test statistic is their relative entropy,

    e = Σ_g n_g ln( n_g N / (N_g n) )  nats,     P(e ≥ x) ≤ exp(-x + (G - 1)(1 + ln(x / (G - 1))))  for x > G - 1

(Agrawal, IEEE Trans. Inf. Theory 66(10), 2020, theorem 1.2, for n independent draws. Its proof bounds E exp(λe), which is
convex in the counts; a draw without replacement has no larger one: Hoeffding 1963, theorem 4.) The bound holds for every n.
So that it says something with a thousand classes, these form at most 16 groups.

The newest n may also differ from the stream by being more mixed. So the share of their pairs that agree, a, is to exceed the
stream's, q, by enough to matter: (a - q) / (1 - q) is 0 for a shuffled stream and 1 for one class after another.

The evidence is gone as soon as the newest n frames are as mixed as the stream: at the latest n frames after it stopped being
sorted. Where a lasting change only narrowed the mix, it is gone when the N frames have taken the new one.

A shift of domain may move a network's answers to one class, which no test on answers can tell from a run of that class. So the
evidence begins anew with every domain, and pixels say when that is (edge/adapt/shift.py).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

__all__ = ["RunEvidence", "RunSettings", "improbability"]


@dataclass(frozen=True)
class RunSettings:
    """Numbers of the switch. Runs of 20 frames of ten classes have a share of 0.11 and more, so that 0.1 sees them; checked on
    gaussian noise, brightness and clean images in the orders of seed 100, where LAME lost on none.

    Attributes:
        window: n, frames; LAME answers as many together.
        reference: N, frames at most.
        least: frames of a domain before anything is said.
        groups: G at most.
        on_chance: bound on the probability, for a stream whose order is chance, below which it switches on: one frame in a
            million.
        on_share: excess agreement that switches on.
        off_chance, off_share: above the one or below the other, it switches off.
    """

    window: int = 64
    reference: int = 4096
    least: int = 128
    groups: int = 16
    on_chance: float = 1e-6
    on_share: float = 0.1
    off_chance: float = 1e-2
    off_share: float = 0.05


def improbability(nats: float, groups: int) -> float:
    """-ln of the module's bound on P(e ≥ nats); 0 where the bound says nothing."""
    free = groups - 1
    if free < 1 or nats <= free:
        return 0.0
    return nats - free * (1.0 + math.log(nats / free))


class RunEvidence:
    """The test over one stream; microseconds a frame. Not thread-safe."""

    def __init__(self, class_count: int, settings: RunSettings | None = None) -> None:
        s = self.settings = settings or RunSettings()
        self._groups = min(class_count, s.groups)
        self._bars = (-math.log(s.on_chance), s.on_share), (-math.log(s.off_chance), s.off_share)
        self.switches = 0
        self.on = False
        self.forget()

    @property
    def memory_bytes(self) -> int:
        """Of the remembered groups and counts, at most: references of 8 bytes to small numbers, which are shared."""
        return 8 * (self.settings.reference + self.settings.window + 2 * self._groups)

    def forget(self) -> None:
        """Begins anew, switched off."""
        self.switches += self.on
        self.on = False
        self._newest: deque[int] = deque()
        self._all: deque[int] = deque()
        self._few, self._many = [0] * self._groups, [0] * self._groups
        self.share = self.improbability = 0.0

    def saw(self, predicted: int) -> bool:
        """Takes the class that the engine itself predicted for one frame; True while corrections are supported."""
        s, group = self.settings, predicted % self._groups
        if len(self._newest) == s.window:
            self._few[self._newest.popleft()] -= 1
        if len(self._all) == s.reference:
            self._many[self._all.popleft()] -= 1
        self._newest.append(group)
        self._all.append(group)
        self._few[group] += 1
        self._many[group] += 1
        if len(self._all) >= s.least:
            self._measure()
        improbability, share = self._bars[self.on]
        on = self.improbability >= improbability and self.share >= share
        self.switches += on != self.on
        self.on = on
        return on

    def _measure(self) -> None:
        n, all_ = len(self._newest), len(self._all)
        alike = sum(c * (c - 1) for c in self._few) / (n * (n - 1))
        expected = sum(c * (c - 1) for c in self._many) / (all_ * (all_ - 1))
        self.share = (alike - expected) / (1 - expected) if expected < 1 else 0.0
        self.improbability = 0.0
        if self.share > 0:
            ratio = all_ / n
            nats = sum(few * math.log(few * ratio / many) for few, many in zip(self._few, self._many, strict=True) if few)
            self.improbability = improbability(nats, self._groups)
