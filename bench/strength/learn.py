"""Strengths learnt without labels: those that keep the exported model's own clean answers on degraded calibration images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.field.networks import CALIBRATION
from bench.strength.degradations import KINDS, draw
from bench.strength.served import KEPT, Served
from demo.images import cifar10

__all__ = ["Domain", "by_group", "calibration_domains", "objective"]

U8 = NDArray[np.uint8]
F64 = NDArray[np.float64]
JUDGED = 128  # other images of a domain, which the objective is taken over
DOMAINS = 16
SKEWED = 4  # one domain in so many has 70 % of one class, by the model's own answers
AGREEMENT = (0.15, 0.85)  # of the exported model with its clean answers: a shift that matters and leaves something
STEPS = (0.7, 0.4, 0.2, 0.0)  # strengths tried for a group, in this order, while they are better
FEW, SMALL = 4, 0.15  # so many groups are gone through a second time, in steps of this
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Domain:
    """Attributes:
    kept, judged: degraded images.
    clean: the exported model's probabilities for the judged ones before that, float64 (JUDGED, classes).
    mix: the class mix the device finds at strength 1, float64 (K,).
    worth: independent images that the kept ones are worth.
    """

    kind: str
    kept: U8
    judged: U8
    clean: F64
    mix: F64
    worth: float
    frozen: float


def calibration_domains(served: Served, seed: int = 0) -> list[Domain]:
    """Domains of a network's calibration images."""
    images = cifar10("train5k")[0][np.random.default_rng(0).permutation(5000)[:CALIBRATION]]
    clean = np.concatenate([served.exported(images[i : i + 64]) for i in range(0, len(images), 64)])
    out: list[Domain] = []
    rng, kinds, ones = np.random.default_rng(seed), tuple(KINDS), np.ones(served.sites)
    while len(out) < DOMAINS:
        kind = kinds[len(out) % len(kinds)]
        degrade = draw(kind, rng)
        chosen = _chosen(clean.argmax(1), rng, skewed=len(out) % SKEWED == SKEWED - 1)
        seen = degrade(images[chosen], rng)
        kept, judged, answers = seen[:KEPT], seen[KEPT:], clean[chosen[KEPT:]]
        frozen = float((served.exported(judged).argmax(1) == answers.argmax(1)).mean())
        if AGREEMENT[0] <= frozen <= AGREEMENT[1]:
            worth = served.worth(kept)
            found = served.estimated(kept, worth, ones)
            out.append(Domain(kind, kept, judged, answers, found.mix, worth, frozen))
    return out


def _chosen(answers: NDArray[np.int64], rng: np.random.Generator, *, skewed: bool) -> NDArray[np.int64]:
    count, order = KEPT + JUDGED, rng.permutation(len(answers))
    if not skewed:
        return order[:count]
    mine = answers[order] == rng.integers(answers.max() + 1)
    one = order[mine][: round(0.7 * count)]
    return rng.permutation(np.concatenate([one, order[~mine][: count - len(one)]]))


def objective(served: Served, domains: list[Domain], strength: F64) -> tuple[F64, F64]:
    """(cross-entropy of adapted with clean answers in nats, share of equal answers), float64 (domains,) each."""
    loss, agreed = [], []
    for d in domains:
        p = served.answers(served.again(d.kept, d.worth, strength, d.mix), strength, d.judged, guarded=False)
        loss.append(float(-(d.clean * np.log(np.maximum(p, 1e-7))).sum(1).mean()))
        agreed.append(float((p.argmax(1) == d.clean.argmax(1)).mean()))
    return np.array(loss), np.array(agreed)


def by_group(served: Served, domains: list[Domain], groups: int, say: Say) -> F64:
    """One strength for each of so many groups of neighbouring sites, float64 (sites,): coordinate descent from 1, from the
    first group to the last; where groups are few, once more in smaller steps.

    Another strength is taken where it lowers the cross-entropy by more than the standard error of that over domains, so that
    chance does not set as many strengths as there are groups.
    """
    strength = np.ones(served.sites)
    cuts = np.array_split(np.arange(served.sites), groups)
    best, agreed = objective(served, domains, strength)
    say(f"1 everywhere: {best.mean():.4f} nats, {100 * agreed.mean():.2f} %")

    def better(cut: NDArray[np.int64], value: float) -> bool:
        nonlocal strength, best
        tried = strength.copy()
        tried[cut] = value
        loss, agreed = objective(served, domains, tried)
        gain, error = float((best - loss).mean()), float((best - loss).std(ddof=1) / np.sqrt(len(loss)))
        say(f"sites {cut[0]} to {cut[-1]} at {value:.2f}: {gain:+.4f} ± {error:.4f} nats, {100 * agreed.mean():.2f} %")
        if gain > error:
            strength, best = tried, loss
        return gain > error

    for cut in cuts:
        for value in STEPS:
            if not better(cut, value):
                break
    if groups <= FEW:
        for cut in cuts:
            for value in (float(strength[cut[0]]) + SMALL, float(strength[cut[0]]) - SMALL):
                if 0 <= value <= 1 and better(cut, value):
                    break
    return strength
