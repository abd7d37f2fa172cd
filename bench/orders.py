"""Orders in which a camera may see the classes: indices into labelled frames, for streams of correlated labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["ORDERS", "alternating", "by_class", "dirichlet", "one_class", "order", "shuffled"]

I64 = NDArray[np.int64]
SLOTS = 20  # of a Dirichlet stream: every class spreads its frames over them
RUN = 20  # frames of one class in a row of an alternating stream

ORDERS = ("shuffled", "sorted", "dirichlet 0.1", "dirichlet 0.01", "alternating 20", "70 % of one class", "one class")


def order(name: str, labels: I64, rng: np.random.Generator) -> I64:
    """Indices (n,) into `labels` (N,) in the named order; n may be below N. "one class" is the class drawn first."""
    if name == "shuffled":
        return shuffled(labels, rng)
    if name == "sorted":
        return by_class(labels, rng)
    if name.startswith("dirichlet"):
        return dirichlet(labels, rng, float(name.split()[1]))
    if name == "alternating 20":
        return alternating(labels, rng)
    if name == "70 % of one class":
        return skewed(labels, rng, 0.7)
    return one_class(labels, rng)


def shuffled(labels: I64, rng: np.random.Generator) -> I64:
    """Every order with the same probability."""
    return rng.permutation(len(labels))


def by_class(labels: I64, rng: np.random.Generator) -> I64:
    """All frames of one class, then all of the next; classes and frames within them in random order."""
    classes = rng.permutation(np.unique(labels))
    return np.concatenate([rng.permutation(np.flatnonzero(labels == c)) for c in classes])


def dirichlet(labels: I64, rng: np.random.Generator, delta: float) -> I64:
    """Each class spreads its frames over the slots by a draw from a Dirichlet distribution; random order within a slot.

    Yuan et al., CVPR 2023 (RoTTA), section 4.1. A small `delta` puts a class into few slots.
    """
    slots: list[list[I64]] = [[] for _ in range(SLOTS)]
    for c in np.unique(labels):
        frames = rng.permutation(np.flatnonzero(labels == c))
        ends = np.round(np.cumsum(rng.dirichlet(np.full(SLOTS, delta))) * len(frames)).astype(np.int64)
        for slot, part in zip(slots, np.split(frames, ends[:-1]), strict=True):
            slot.append(part)
    return np.concatenate([rng.permutation(np.concatenate(slot)) for slot in slots])


def alternating(labels: I64, rng: np.random.Generator) -> I64:
    """RUN frames of one class, then RUN of another, never the same twice in a row, until a class has no RUN frames left."""
    left = {int(c): list(rng.permutation(np.flatnonzero(labels == c))) for c in np.unique(labels)}
    out: list[int] = []
    last = -1
    while choices := [c for c, frames in left.items() if c != last and len(frames) >= RUN]:
        last = int(rng.choice(choices))
        out += left[last][:RUN]
        del left[last][:RUN]
    return np.array(out, np.int64)


def skewed(labels: I64, rng: np.random.Generator, share: float) -> I64:
    """One class has `share` of the frames, the others the rest evenly; in random order: nothing comes in runs."""
    c = rng.choice(np.unique(labels))
    many, others = np.flatnonzero(labels == c), np.flatnonzero(labels != c)
    rest = rng.permutation(others)[: round(len(many) * (1 - share) / share)]
    return rng.permutation(np.concatenate([many, rest]))


def one_class(labels: I64, rng: np.random.Generator) -> I64:
    """All frames of one class, which is drawn."""
    return rng.permutation(np.flatnonzero(labels == rng.choice(np.unique(labels))))
