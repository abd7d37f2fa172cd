"""Whether the model was trained on another reading of the images: other scaling, other means, blue and red exchanged.

Three witnesses, none of which needs the training data:

* *Running statistics.* A norm has stored the mean and the variance of what it saw in training. Under the right reading what it
  sees is near them; under a wrong one every layer from the first on is off. The mismatch is the squared Hellinger distance
  between the two normal distributions (0: the same, 1: they do not overlap), averaged over a norm's channels and over norms.
* *Confidence*, image by image: under the right reading most images are answered with less entropy. It tells BGR from RGB, which
  the statistics of natural images hardly do.
* *Labels*, where there are any: the same images under both readings, by McNemar's exact test.

A reading is called more likely only where the witnesses that exist do not contradict each other. The thresholds were chosen on
ResNet-44 and the AugMix ResNet-56 of the tests' data; docs/adr/014-what-export-doubts.md has what they give on other models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.diagnose.amount import FEWEST
from export.diagnose.chance import information
from export.diagnose.finding import Finding
from export.diagnose.intervals import at_least, paired
from export.interpret import batches, float_parameters, run
from export.ir import Graph, Node
from export.operators import Parameters, batch_norm
from export.preprocessing import SETS
from refold.preprocess import Preprocess, Resize

__all__ = ["Response", "doubt_channels", "doubt_scaling", "leading", "mismatch_of", "readings", "respond", "unlikely_reading"]

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]

LARGE = 64 * 64  # pixels from which fewer images are run
COMPARED, COMPARED_LARGE = 256, 64  # images on which RGB and BGR compete
SCREENED = 4  # times fewer on which the scalings do: they differ more
ALIKE = 0.25  # of a reading's spread that two may differ by and still count as one: ImageNet's and CIFAR's constants do
CLOSER = 1.5  # times the other scaling's statistics must be closer
APART = 0.01  # squared Hellinger distance they must be closer by
SURE, LIKELY = 0.001, 0.02  # probability of the evidence if both readings were equally good
CLEARLY = 1.1  # times closer from which the channel order needs only LIKELY evidence of the images
CLEAN = 0.05  # mismatch above which the images are not what the model was trained on, however they are read
INFORMED = 0.2  # of log(classes): what a model without running statistics must tell more under the other reading


@dataclass(frozen=True)
class Response:
    """What the float model does with the images under one reading.

    Attributes:
        logits: float32 (N, classes).
        mismatch: of the norms' statistics, 0 to 1; None where no norm has any.
    """

    logits: F32
    mismatch: float | None

    @property
    def predicted(self) -> I64:
        return np.asarray(self.logits.argmax(1), np.int64)

    @property
    def entropy(self) -> NDArray[np.float64]:
        """Of each answer, nats: float64 (N,)."""
        shifted = self.logits.astype(np.float64) - self.logits.max(1, keepdims=True)
        total = np.exp(shifted).sum(1)
        entropy: NDArray[np.float64] = np.log(total) - (np.exp(shifted) * shifted).sum(1) / total
        return entropy


def readings(stated: Preprocess) -> dict[str, Preprocess]:
    """Other scalings people use, by what --preprocess calls them; those that are nearly the stated one are left out."""
    centred = tuple(round(255 * m, 3) for m in SETS["imagenet"]["mean"])
    named: dict[str, dict[str, Any]] = {
        **SETS,
        f"scale=1,mean={'/'.join(f'{m:g}' for m in centred)}": {"mean": centred, "scale": 1.0},
    }
    plain: dict[str, Any] = {"scale": 1 / 255, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    others = {name: replace(stated, **{**plain, **values}) for name, values in named.items()}
    return {name: other for name, other in others.items() if _difference(stated, other) > ALIKE}


def _difference(one: Preprocess, other: Preprocess) -> float:
    a, b = one.table(), other.table()
    return float(np.sqrt(((a - b) ** 2).mean()) / max(float(a.std(1).mean()), 1e-12))


def respond(graph: Graph, x: F32) -> Response:
    """Runs the float graph.

    Args:
        x: float32 (N, 3, H, W).
    """
    parameters, moments = float_parameters(graph), _Moments(graph)
    with torch.no_grad():
        logits = np.concatenate([run(graph, batch, parameters, None, moments.norm).numpy() for batch in batches(x)])
    return Response(logits, moments.mismatch())


class _Moments:
    """Mean and variance of what every norm with running statistics sees, over all batches: moments about the stored mean."""

    def __init__(self, graph: Graph) -> None:
        normed = [n for n in graph.nodes if "mean" in n.parameters and "variance" in n.parameters]
        self.stored = {n.output: [graph.constants[n.parameters[r]] for r in ("mean", "variance")] for n in normed}
        self.epsilon = {n.output: float(n.attributes.get("epsilon", 0.0)) for n in normed}
        self.sums = {n.output: np.zeros((2, len(self.stored[n.output][0]))) for n in normed}
        self.counts = dict.fromkeys(self.stored, 0)

    def norm(self, node: Node, y: Tensor, parameters: Parameters) -> Tensor:
        if node.output in self.stored:
            axes = [0, *range(2, y.dim())]
            off = y - parameters["mean"].view(1, -1, *[1] * (y.dim() - 2))  # var_mean takes ten times as long
            moments = [t.mean(axes).double().numpy() for t in (off, off * off)]
            self.sums[node.output] += len(y) * np.stack(moments)
            self.counts[node.output] += len(y)
        return batch_norm(node, y, parameters)

    def mismatch(self) -> float | None:
        each = []
        for output, sums in self.sums.items():
            off, square = sums / max(self.counts[output], 1)
            mean, variance = self.stored[output]
            each.append(mismatch_of(mean + off, np.maximum(square - off**2, 0.0), mean, variance, self.epsilon[output]))
        return float(np.mean(each)) if each else None


def mismatch_of(
    mean: NDArray[np.float64], variance: NDArray[np.float64], stored_mean: F32, stored_variance: F32, epsilon: float = 1e-5
) -> float:
    """Squared Hellinger distance between normal distributions, mean over channels; all arrays (channels,).

    1 - sqrt(2 s t / (s² + t²)) exp(-(m - n)² / (4 (s² + t²))); Pardo, "Statistical Inference Based on Divergence Measures"
    (2006), chapter 1. `epsilon` is added to both variances as the norm does, so that dead channels match.
    """
    a, b = variance + epsilon, stored_variance.astype(np.float64) + epsilon
    overlap = np.sqrt(2 * np.sqrt(a * b) / (a + b)) * np.exp(-((mean - stored_mean) ** 2) / (4 * (a + b)))
    return float(np.mean(1 - overlap))


def leading(others: Mapping[str, Response], labels: I64 | None) -> str:
    """Of several readings the one with the nearest statistics; without statistics, with the most right or the most told."""

    def merit(name: str) -> float:
        response = others[name]
        if response.mismatch is not None:
            return -response.mismatch
        return float((response.predicted == labels).sum()) if labels is not None else information(response.logits)

    return max(others, key=merit)


def doubt_scaling(stated: Response, other: Response, labels: I64 | None, trials: int = 1) -> bool:
    """Another scaling is more likely than the stated one.

    Args:
        labels: int64 (N,), or None.
        trials: how many scalings `other` was chosen among.
    """
    if stated.mismatch is not None and other.mismatch is not None:
        if other.mismatch * CLOSER < stated.mismatch and other.mismatch + APART < stated.mismatch:
            return labels is None or not _contradicted(stated, other, labels)
        return other.mismatch < stated.mismatch and _by_labels(stated, other, labels, trials)
    if labels is not None:
        return _by_labels(stated, other, labels, trials)
    gained = information(other.logits) - information(stated.logits)
    return gained > INFORMED * float(np.log(stated.logits.shape[1]))


def doubt_channels(stated: Response, swapped: Response, labels: I64 | None) -> bool:
    """Red and blue seem to be exchanged."""
    if stated.mismatch is not None and swapped.mismatch is not None and swapped.mismatch >= stated.mismatch:
        return False
    if labels is not None:
        if _contradicted(stated, swapped, labels):
            return False
        if _by_labels(stated, swapped, labels, 1):
            return True
    lower = swapped.entropy < stated.entropy
    p = at_least(int(lower.sum()), len(lower), 0.5)
    if p < SURE:
        return stated.mismatch is not None or information(swapped.logits) > information(stated.logits)
    a, b = stated.mismatch, swapped.mismatch
    return a is not None and b is not None and p < LIKELY and b * CLEARLY < a and b < CLEAN


def _contradicted(stated: Response, other: Response, labels: I64) -> bool:
    better, worse = _only(stated, other, labels)
    return paired(better, worse) < LIKELY


def _by_labels(stated: Response, other: Response, labels: I64 | None, trials: int) -> bool:
    return labels is not None and paired(*_only(other, stated, labels)) * trials < SURE


def _only(one: Response, other: Response, labels: I64) -> tuple[int, int]:
    """(images that only the first gets right, images that only the second does)."""
    a, b = one.predicted == labels, other.predicted == labels
    return int((a & ~b).sum()), int((b & ~a).sum())


def unlikely_reading(graph: Graph, images: U8, stated: Preprocess, labels: I64 | None) -> Iterator[Finding]:
    """Compares the stated reading with others.

    Args:
        graph: the float graph after its rules.
        images: uint8 (N, H, W, 3) at the model's size.
        labels: int64 (N,), or None.
    """
    large = stated.width * stated.height >= LARGE
    many = np.linspace(0, len(images) - 1, min(len(images), COMPARED_LARGE if large else COMPARED)).astype(np.int64)
    images, labels = images[many], None if labels is None else labels[many]
    few = np.arange(0, len(images), SCREENED if len(images) >= SCREENED * FEWEST else 1)
    first = respond(graph, stated.apply(images))
    better, plain = _better_scaling(graph, images, stated, few, first, labels)
    likely = stated if better is None else readings(stated)[better]
    swapped = respond(graph, likely.apply(np.ascontiguousarray(images[..., ::-1])))
    exchanged = doubt_channels(plain, swapped, labels)
    if better is None and not exchanged:
        return
    last, said = swapped if exchanged else plain, []
    if better is not None:
        said.append(f"with --preprocess {stated.width}x{stated.height},{better}{_resizing(stated)}")
    if exchanged:
        said.append("with red and blue exchanged (BGR)")
    numbers, told = _compared(first, last, labels)
    advice = []
    if better is not None:
        advice.append("Check --preprocess against the model's training.")
    if exchanged:
        advice.append(
            "If the images come from OpenCV, convert them to RGB; if the model was trained on BGR, reverse the input channels "
            "of its first convolution (weight.flip(1)): devices give RGB."
        )
    yield Finding(
        "input-reading",
        f"The model seems to have been trained on another input: {' and '.join(said)} {told}. {' '.join(advice)}",
        {**numbers, "scaling": float(better is not None), "channels": float(exchanged)},
    )


def _resizing(stated: Preprocess) -> str:
    """The part of --preprocess that says how images are brought to size, as stated."""
    if stated.resize is Resize.CENTRE_CROP:
        return f",resize=crop,short={stated.resize_short}"
    return ",resize=stretch" if stated.resize is Resize.STRETCH else ""


def _better_scaling(
    graph: Graph, images: U8, stated: Preprocess, few: NDArray[np.int64], first: Response, labels: I64 | None
) -> tuple[str | None, Response]:
    """The more likely scaling's name, if there is one, and the response under it, else `first`.

    All compete on the images `few`; the best of them meets the stated one on all.
    """
    part, others = None if labels is None else labels[few], {}
    candidates = {**readings(stated), "": stated}
    for name, candidate in candidates.items():
        found = respond(graph, candidate.apply(images[few]))
        if np.isfinite(found.logits).all():
            others[name] = found
    leader = leading(others, part)
    if leader:
        found = respond(graph, candidates[leader].apply(images))
        if doubt_scaling(first, found, labels, len(others) - 1):
            return leader, found
    return None, first


def _compared(stated: Response, other: Response, labels: I64 | None) -> tuple[dict[str, float], str]:
    numbers, told = {"images": float(len(stated.logits))}, []
    if labels is not None:
        a, b = (float((r.predicted == labels).mean()) for r in (stated, other))
        numbers |= {"accuracy": a, "accuracy_other": b}
        told.append(f"it gets {b:.1%} instead of {a:.1%} of {len(labels)} labelled images right")
    if stated.mismatch is not None and other.mismatch is not None:
        numbers |= {"mismatch": stated.mismatch, "mismatch_other": other.mismatch}
        told.append(
            f"its norms see values {stated.mismatch / max(other.mismatch, 1e-9):.1f} times closer to their running statistics "
            f"(squared Hellinger distance {other.mismatch:.3f} instead of {stated.mismatch:.3f})"
        )
    share = float((other.entropy < stated.entropy).mean())
    numbers["more_confident"] = share
    if not told or share > 0.5:
        told.append(f"{share:.0%} of the images are answered more confidently")
    return numbers, ", ".join(told)
