"""Keeps score: what the device answered, what the frozen engine would have, and what was right. Pure; no clock, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from demo.plan import Phase, Plan

__all__ = ["WINDOW", "Answer", "Recall", "Tally", "recall"]

WINDOW = 200  # frames behind "accuracy of the last 200 frames"


@dataclass(frozen=True)
class Answer:
    """One line of the device's predictions. `entropy` in nats; `version` 0 and `domain` "d0" as exported."""

    frame: int
    predicted: int
    entropy: float
    version: int
    domain: str


@dataclass
class Tally:
    """labels and frozen: int64 (frames,), the truth and the frozen engine's answers."""

    plan: Plan
    labels: NDArray[np.int64]
    frozen: NDArray[np.int64]
    predicted: NDArray[np.int64] = field(init=False)
    entropy: NDArray[np.float64] = field(init=False)
    version: NDArray[np.int64] = field(init=False)
    domain: list[str] = field(init=False)
    seen: int = 0  # answers so far
    last: int = -1  # highest frame answered
    twice: int = 0

    def __post_init__(self) -> None:
        n = self.plan.frames
        self.predicted = np.full(n, -1, np.int64)
        self.entropy = np.full(n, np.nan)
        self.version = np.zeros(n, np.int64)
        self.domain = [""] * n

    def add(self, answer: Answer) -> None:
        f = answer.frame
        if not 0 <= f < self.plan.frames:
            return
        if self.predicted[f] >= 0:
            self.twice += 1
            return
        self.predicted[f], self.entropy[f] = answer.predicted, answer.entropy
        self.version[f], self.domain[f] = answer.version, answer.domain
        self.seen += 1
        self.last = max(self.last, f)

    @property
    def lost(self) -> int:
        """Frames without an answer."""
        return self.plan.frames - self.seen

    def accuracy(self, first: int, last: int) -> tuple[float, float]:
        """(adapted, frozen) in per cent over the answered frames of first .. last; NaN where there are none."""
        part = slice(max(first, 0), max(last, 0))
        answered = self.predicted[part] >= 0
        if not answered.any():
            return float("nan"), float("nan")
        truth = self.labels[part][answered]
        adapted = float((self.predicted[part][answered] == truth).mean())
        return 100 * adapted, 100 * float((self.frozen[part][answered] == truth).mean())

    def recent(self, frame: int | None = None) -> tuple[float, float]:
        """(adapted, frozen) in per cent over the `WINDOW` frames up to `frame`, by default the last one answered."""
        end = (self.last if frame is None else frame) + 1
        return self.accuracy(end - WINDOW, end)

    def shifted(self) -> tuple[float, float]:
        """(adapted, frozen) in per cent over every phase that is not clean, all frames together."""
        return self.accuracy(next(p.first for p in self.plan.phases if p.weather != "clean"), self.plan.frames)

    def series(self, every: int = 10) -> dict[str, list[float]]:
        """What the report's plot shows, one value per `every` frames."""
        at = range(every - 1, self.last + 1, every)
        pairs = [self.recent(f) for f in at]
        entropy = [self._mean_entropy(f) for f in at]
        return {
            "frame": [float(f + 1) for f in at],
            "adapted": [round(a, 2) for a, _ in pairs],
            "frozen": [round(b, 2) for _, b in pairs],
            "entropy": [round(e, 4) for e in entropy],
        }

    def _mean_entropy(self, frame: int) -> float:
        answered = self.entropy[max(0, frame + 1 - WINDOW) : frame + 1]
        answered = answered[np.isfinite(answered)]
        return float(answered.mean()) if answered.size else 0.0

    def recent_entropy(self) -> float:
        """Mean entropy in nats over the last `WINDOW` frames."""
        return self._mean_entropy(self.last)


@dataclass(frozen=True)
class Recall:
    """How a weather that comes back was met.

    Attributes:
        frames: frames of the returned phase before the device served it as the domain it had known; -1: never.
        domain: that domain, "" if none.
        releases: versions of that domain that arrived between the return and the recall: 0 means the cloud was not needed.
        adapted, frozen: accuracy in per cent of the phase after the recall.
        first_time: accuracy in per cent of the same number of first frames when the weather came for the first time.
        returned: the same when it came back.
    """

    frames: int
    domain: str
    releases: int
    adapted: float
    frozen: float
    first_time: float
    returned: float


def recall(tally: Tally, first: Phase, again: Phase, arrivals: list[tuple[int, str]], early: int = 300) -> Recall:
    """Judges the fog's return.

    Args:
        arrivals: (frame at which it was installed, domain) of every release that the device served.
        early: how many frames count as the beginning of a phase.
    """
    before = {tally.domain[again.first - 1]} if again.first else set()
    known = _known_domains(tally, first) - before  # what served up to the return was not recalled by it
    served = [f for f in range(again.first, again.last) if tally.domain[f] in known]
    start = tally.accuracy(first.first, first.first + early)[0], tally.accuracy(again.first, again.first + early)[0]
    if not served:
        after = tally.accuracy(again.first, again.last)
        return Recall(-1, "", 0, *after, *start)
    frame = served[0]
    domain = tally.domain[frame]
    needed = sum(again.first <= f <= frame and of == domain for f, of in arrivals)
    return Recall(frame - again.first, domain, needed, *tally.accuracy(frame, again.last), *start)


def _known_domains(tally: Tally, phase: Phase) -> set[str]:
    """Domains that served at least a tenth of a phase, without the one the bundle was exported for."""
    served = tally.domain[phase.first : phase.last]
    return {d for d in set(served) if d not in ("", "d0") and served.count(d) >= phase.frames / 10}
