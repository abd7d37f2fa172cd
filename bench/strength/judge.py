"""Strengths judged on the development corruptions, and one strength chosen for each domain from its kept images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bench.corrupt import corrupt
from bench.field.networks import images_of
from bench.strength.served import KEPT, Served

__all__ = ["CORRUPTIONS", "ORDERS", "accuracies", "stream"]

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
F64 = NDArray[np.float64]
CORRUPTIONS = (
    "gaussian_noise", "impulse_noise", "glass_blur", "zoom_blur", "frost", "brightness", "elastic_transform",
    "jpeg_compression",
)  # fmt: skip
JUDGED = 400  # images of the same stream after the kept ones
ORDERS: dict[str, tuple[int, float]] = {"mixed": (0, 0.0), "ships": (8, 1.0), "70 % planes": (0, 0.7), "cats": (3, 1.0)}


def stream(network: str, corruption: str, order: str, seed: int) -> tuple[U8, I64]:
    """Kept and judged images, none of them twice, and their labels. A network's name decides its images alone."""
    images, labels = images_of(network)
    rng = np.random.default_rng([seed, *corruption.encode(), *order.encode()])
    kind, share = ORDERS[order]
    count, mixed = KEPT + JUDGED, rng.permutation(len(labels))
    one = rng.permutation(np.flatnonzero(labels == kind))[: round(share * count)]
    rest = mixed[~np.isin(mixed, one)][: count - len(one)]
    chosen = rng.permutation(np.concatenate([one, rest]))
    return corrupt(corruption, 5, images[chosen], seed), labels[chosen]


def accuracies(
    served: Served, images: U8, labels: I64, strengths: Mapping[str, F64], scalars: tuple[float, ...] = (1.0,)
) -> dict[str, float]:
    """Accuracy in % of the exported model, at each of the strengths, at each scalar everywhere, and at the scalar that each
    rule chooses by the kept images. "best" chooses by the labels of the judged ones: a bound.

    Args:
        strengths: float64 (sites,) each; the device's whole measurement is made at every one.
        scalars: 1 is measured whole, the others go on from what it found.
    """
    kept, judged, truth = images[:KEPT], images[KEPT:], labels[KEPT:]
    worth = served.worth(kept)

    def right(p: F64) -> float:
        return 100 * float((p.argmax(1) == truth).mean())

    out = {"frozen": right(served.exported(judged))}
    for name, strength in strengths.items():
        out[name] = right(served.answers(served.estimated(kept, worth, strength), strength, judged))
    whole = served.estimated(kept, worth, np.ones(served.sites))
    told: dict[float, dict[str, float]] = {}
    views = np.concatenate([judged, kept, kept[:, :, ::-1]])
    for scalar in scalars:
        strength = np.full(served.sites, scalar)
        found = whole if scalar == 1 else served.onwards(kept, whole, strength)
        p = served.answers(found, strength, views)
        out[f"{scalar:g}"], told[scalar] = right(p[:JUDGED]), _evidence(p[JUDGED:-KEPT], p[-KEPT:])
    for rule in told[scalars[0]]:
        chosen = max(scalars, key=lambda w: (told[w][rule], w))
        out[rule] = out[f"{chosen:g}"]
    out["best"] = max(out[f"{w:g}"] for w in scalars)
    return out


def _evidence(p: F64, mirrored: F64) -> dict[str, float]:
    """What speaks for a strength by each rule, larger is better: answers to the kept images and to their mirror images."""

    def entropy(q: F64) -> F64:
        return np.asarray(-(q * np.log(np.maximum(q, 1e-12))).sum(-1), np.float64)

    return {
        "agreement": float((p * mirrored).sum(1).mean()),
        "information": float(entropy(p.mean(0)) - entropy(p).mean()),
        "entropy": -float(entropy(p).mean()),
    }
