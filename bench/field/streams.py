"""Streams as a device in the field has them: classes come in runs, cameras stand still, shifts are short, alike, or come back.

A stream is a list of parts; a part is a corruption at a severity and the labels' order. Everything is drawn from a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.corrupt import corrupt

__all__ = ["STREAMS", "Frames", "Part", "frames_of", "streams_for"]

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
Order = Callable[[I64, np.random.Generator, int], I64]


@dataclass(frozen=True)
class Part:
    """Attributes:
    corruption: of `bench.corrupt`, "clean", or "dark": a third of the light.
    order: chooses images: labels, generator, count → indices.
    """

    count: int
    corruption: str = "clean"
    severity: int = 5
    order: str = "shuffled"


@dataclass(frozen=True, eq=False)
class Frames:
    images: U8
    labels: I64


def shuffled(labels: I64, rng: np.random.Generator, count: int) -> I64:
    rounds = -(-count // len(labels))
    return np.concatenate([rng.permutation(len(labels)) for _ in range(rounds)])[:count]


def _only(*classes: int) -> Order:
    def order(labels: I64, rng: np.random.Generator, count: int) -> I64:
        return rng.choice(np.flatnonzero(np.isin(labels, classes)), count)

    return order


def _mostly(kind: int, share: float) -> Order:
    """A share of one class, the rest of all classes."""

    def order(labels: I64, rng: np.random.Generator, count: int) -> I64:
        one = rng.choice(np.flatnonzero(labels == kind), round(share * count))
        return rng.permutation(np.concatenate([one, shuffled(labels, rng, count - len(one))]))

    return order


def _sorted(labels: I64, rng: np.random.Generator, count: int) -> I64:
    chosen = shuffled(labels, rng, count)
    return chosen[np.argsort(labels[chosen], kind="stable")]


def _dirichlet(concentration: float, slots: int = 10) -> Order:
    """Every class is spread over time slots by a draw of its own (Yurochkin et al. 2019; NOTE, Gong et al. 2022)."""

    def order(labels: I64, rng: np.random.Generator, count: int) -> I64:
        chosen, out = shuffled(labels, rng, count), [list[int]() for _ in range(slots)]
        for kind in np.unique(labels[chosen]):
            mine = chosen[labels[chosen] == kind]
            where = rng.choice(slots, len(mine), p=rng.dirichlet(np.full(slots, concentration)))
            for index, slot in zip(mine, where, strict=True):
                out[slot].append(int(index))
        return np.concatenate([rng.permutation(np.array(slot, np.int64)) for slot in out])

    return order


def _still(labels: I64, rng: np.random.Generator, count: int) -> I64:
    return np.full(count, int(rng.integers(len(labels))))


ORDERS: dict[str, Order] = {
    "shuffled": shuffled,
    "sorted": _sorted,
    "still": _still,
    "dirichlet 0.1": _dirichlet(0.1),
    "dirichlet 0.01": _dirichlet(0.01),
    "70 % of one class": _mostly(0, 0.7),
    "ships": _only(8),
    "cats": _only(3),
    "frogs": _only(6),
}


def _alternating(a: str, b: str, each: int, times: int) -> tuple[Part, ...]:
    return tuple(Part(each, name) for _ in range(times) for name in (a, b))


STREAMS: dict[str, tuple[Part, ...]] = {
    "clean": (Part(2000),),
    "clean, sorted by class": (Part(2000, order="sorted"),),
    "clean, Dirichlet 0.1": (Part(2000, order="dirichlet 0.1"),),
    "clean, Dirichlet 0.01": (Part(2000, order="dirichlet 0.01"),),
    "clean, ships": (Part(1000, order="ships"),),
    "clean, cats": (Part(1000, order="cats"),),
    "clean, frogs": (Part(1000, order="frogs"),),
    "clean, 70 % of one class": (Part(1500, order="70 % of one class"),),
    "500 mixed, then 500 ships": (Part(500), Part(500, order="ships")),
    "still camera, then clean": (Part(300, order="still"), Part(700)),
    "noise": (Part(300), Part(1500, "gaussian_noise")),
    "noise, ships": (Part(300), Part(1000, "gaussian_noise", order="ships")),
    "motion blur, ships": (Part(300), Part(1000, "motion_blur", order="ships")),
    "motion blur, 70 % of one class": (Part(300), Part(1000, "motion_blur", order="70 % of one class")),
    "fog, Dirichlet 0.1": (Part(300), Part(1500, "fog", order="dirichlet 0.1")),
    "brightness, sorted by class": (Part(300), Part(1500, "brightness", order="sorted")),
    "JPEG, Dirichlet 0.1": (Part(300), Part(1500, "jpeg_compression", order="dirichlet 0.1")),
    "shot noise, then impulse noise": (Part(300), Part(1000, "shot_noise"), Part(1000, "impulse_noise")),
    "fog and clean in turn, each 20": _alternating("clean", "fog", 20, 30),
    "contrast, rising and falling": tuple(Part(250, "contrast", s) for s in (1, 2, 3, 4, 5, 4, 3, 2, 1)),
    "day and dark, twice": (Part(400), Part(400, "dark"), Part(400), Part(400, "dark")),
    "50 frames of snow": (Part(400), Part(50, "snow"), Part(550)),
    "100 frames of pixelate": (Part(400), Part(100, "pixelate"), Part(500)),
    "lens cap": (Part(300), Part(100, "black"), Part(300)),
}
PHOTOGRAPHS: dict[str, tuple[Part, ...]] = {
    "clean": (Part(400),),
    "clean, sorted by class": (Part(400, order="sorted"),),
    "still camera, then clean": (Part(150, order="still"), Part(250)),
    "noise": (Part(150), Part(400, "gaussian_noise")),
    "contrast": (Part(150), Part(400, "contrast")),
    "brightness": (Part(150), Part(400, "brightness")),
    "JPEG": (Part(150), Part(400, "jpeg_compression")),
    "noise, sorted by class": (Part(150), Part(400, "gaussian_noise", order="sorted")),
    "50 frames of contrast": (Part(200), Part(50, "contrast"), Part(200)),
    "lens cap": (Part(150), Part(60, "black"), Part(150)),
}


def streams_for(photographs: bool) -> dict[str, tuple[Part, ...]]:
    return PHOTOGRAPHS if photographs else STREAMS


def frames_of(parts: Sequence[Part], images: U8, labels: I64, seed: int) -> Frames:
    """The frames of a stream, in order."""
    pictures, truth = [], []
    for i, part in enumerate(parts):
        rng = np.random.default_rng([seed, i])
        chosen = ORDERS[part.order](labels, rng, part.count)
        pictures.append(_seen(part, images[chosen], seed + i))
        truth.append(labels[chosen])
    return Frames(np.concatenate(pictures), np.concatenate(truth))


def _seen(part: Part, images: U8, seed: int) -> U8:
    if part.corruption == "dark":
        return (images // 3).astype(np.uint8)
    if part.corruption == "black":
        return np.zeros_like(images)
    if part.order == "still" and part.corruption != "clean":
        return np.repeat(corrupt(part.corruption, part.severity, images[:1], seed), len(images), 0)
    return corrupt(part.corruption, part.severity, images, seed)
