"""The switch: do the classes a device predicts come in runs? A permutation test, without labels.

Of the stream's last N predicted classes (N_c of class c), the newest n are looked at (n_c of class c). Their agreement

    a = Σ n_c (n_c - 1) / n (n - 1)

is the share of pairs of the same class. Were the order of the N frames chance, the newest n would be a draw without
replacement, and the mean of `a` exactly q = Σ N_c (N_c - 1) / N (N - 1), whatever the class mix: a stream of one class, a
skewed one, and a network that answers one class for everything explain their own agreement. The variance is that of n
independent draws, which is larger:

    Var a = [ q(1 - q) · n(n-1)/2 + n(n-1)(n-2) (t - q²) ] / (n(n-1)/2)²        q = Σ (N_c/N)², t = Σ (N_c/N)³

Evidence is an excess a - q of so many standard deviations and of a size that matters, as a share of the 1 - q that there could
be. It is gone as soon as the newest n frames are as mixed as the stream: at the latest n frames after it stopped being sorted.
Where a lasting change only narrowed the mix, it is gone when the N frames have taken the new one.

A shift of domain may move a network's answers to one class, which no test on answers can tell from a run of that class. So the
evidence begins anew with every domain, and pixels say when that is (edge/adapt/shift.py).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

__all__ = ["RunEvidence", "RunSettings"]


@dataclass(frozen=True)
class RunSettings:
    """Numbers of the switch, chosen on gaussian noise, brightness and clean images in the orders of seed 100.

    Attributes:
        window: n, frames; LAME answers as many together.
        reference: N, frames at most; 16 KB.
        least: frames of a domain before anything is said.
        on_deviations: standard deviations of excess that switch on.
        on_share: excess, as a share of what there could be, that switches on.
        off_deviations, off_share: below either, it switches off.
    """

    window: int = 64
    reference: int = 4096
    least: int = 128
    on_deviations: float = 6.0
    on_share: float = 0.2
    off_deviations: float = 3.0
    off_share: float = 0.1


class RunEvidence:
    """The test over one stream. Microseconds a frame: sums of powers of the counts follow each frame in and out."""

    def __init__(self, class_count: int, settings: RunSettings | None = None) -> None:
        self.settings = settings or RunSettings()
        self._classes = class_count
        self.switches = 0
        self.on = False
        self.forget()

    @property
    def memory_bytes(self) -> int:
        """Of the remembered classes and counts, at most (8-byte references; small numbers are shared)."""
        return 8 * (self.settings.reference + self.settings.window + 2 * self._classes)

    def forget(self) -> None:
        """Begins anew, switched off."""
        self.switches += self.on
        self.on = False
        self._newest: deque[int] = deque()
        self._all: deque[int] = deque()
        self._few, self._many = [0] * self._classes, [0] * self._classes
        self._few2 = self._many2 = self._many3 = 0
        self.share = self.deviations = 0.0

    def saw(self, predicted: int) -> bool:
        """Takes the class that the engine itself predicted for one frame; True while corrections are supported."""
        s, few, many = self.settings, self._few, self._many
        if len(self._newest) == s.window:
            old = self._newest.popleft()
            self._few2 -= 2 * few[old] - 1
            few[old] -= 1
        if len(self._all) == s.reference:
            old = self._all.popleft()
            c = many[old]
            self._many2 -= 2 * c - 1
            self._many3 -= 3 * c * (c - 1) + 1
            many[old] = c - 1
        self._newest.append(predicted)
        self._all.append(predicted)
        self._few2 += 2 * few[predicted] + 1
        few[predicted] += 1
        c = many[predicted]
        self._many2 += 2 * c + 1
        self._many3 += 3 * c * (c + 1) + 1
        many[predicted] = c + 1
        if len(self._all) >= s.least:
            self._measure()
        deviations, share = (s.off_deviations, s.off_share) if self.on else (s.on_deviations, s.on_share)
        on = self.deviations >= deviations and self.share >= share
        self.switches += on != self.on
        self.on = on
        return on

    def _measure(self) -> None:
        n, all_ = len(self._newest), len(self._all)
        pairs = n * (n - 1) / 2
        agreement = (self._few2 - n) / (2 * pairs)
        expected = (self._many2 - all_) / (all_ * (all_ - 1))
        q, t = self._many2 / all_**2, self._many3 / all_**3
        variance = (q * (1 - q) * pairs + n * (n - 1) * (n - 2) * max(t - q * q, 0.0)) / pairs**2
        excess = agreement - expected
        self.share = excess / (1 - expected) if expected < 1 else 0.0
        self.deviations = excess / variance**0.5 if variance > 0 else 0.0
