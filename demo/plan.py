"""What the demo's device will see, decided before anything starts: phases, pictures, and labels only the driver has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from demo.weather import SEVERE, Climate, weather
from refold.errors import UsageError

__all__ = ["Phase", "Plan", "Stream", "make_plan", "make_stream"]

# Fog and noise are each as long as a first release takes: some 540 frames until enough is uploaded, then its training.
SHARES = (("clean", "clean", 0.10), ("fog", "fog", 0.36), ("noise", "noise", 0.40), ("fog again", "fog", 0.14))
FEWEST_FRAMES = 400


@dataclass(frozen=True)
class Phase:
    """Frames `first` .. `last` (exclusive) of the stream, all in the same weather."""

    name: str
    weather: str
    first: int
    last: int

    @property
    def frames(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Plan:
    phases: tuple[Phase, ...]

    @property
    def frames(self) -> int:
        return self.phases[-1].last

    def phase_of(self, frame: int) -> Phase:
        return next((p for p in self.phases if frame < p.last), self.phases[-1])


@dataclass(frozen=True)
class Stream:
    """images uint8 (frames, 32, 32, 3), which the device sees, and labels int64 (frames,), which it does not."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def make_plan(frames: int) -> Plan:
    """Clean, fog, noise, and the fog again; `frames` in all, split by `SHARES`."""
    if frames < FEWEST_FRAMES:
        raise UsageError(f"The demo needs at least {FEWEST_FRAMES} frames to show four phases; {frames} were asked for.")
    phases, first, share = [], 0, 0.0
    for name, kind, part in SHARES:
        share += part
        last = frames if name == SHARES[-1][0] else round(frames * share)
        phases.append(Phase(name, kind, first, last))
        first = last
    return Plan(tuple(phases))


def make_stream(
    plan: Plan, images: NDArray[np.uint8], labels: NDArray[np.int64], seed: int, climate: Climate = SEVERE
) -> Stream:
    """Puts pictures in a random order without repeating one while there are any left, each phase in its weather."""
    rng = np.random.default_rng(seed)
    rounds = -(-plan.frames // len(images))
    order = np.concatenate([rng.permutation(len(images)) for _ in range(rounds)])[: plan.frames]
    seen = [weather(p.weather, images[order[p.first : p.last]], rng, climate) for p in plan.phases]
    return Stream(np.concatenate(seen), labels[order])
