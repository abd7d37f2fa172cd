"""Whether the model's answers have anything to do with the labels, or, where there are none, with the images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from export.diagnose.amount import FEWEST
from export.diagnose.finding import Finding
from export.diagnose.intervals import at_least, interval

__all__ = ["above_chance", "chance", "information", "one_answer"]

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
DOUBT = 0.01  # probability of as many hits by chance from which they are no evidence
LEAST_SKILL = 0.15  # of the way from chance to perfect that an accuracy must be able to have reached
LEAST_INFORMATION = 0.05  # of log(classes): what an answer must say about its image
TOLD = 0.5  # mean confidence above which one answer for all may be the truth: images of a single class
NEAR = 0.05  # `export.diagnose.reading`: mismatch up to which an input is what the norms were trained on


def _by_chance(predicted: I64, labels: I64) -> float:
    """Share of agreement between two columns with these frequencies that know nothing of each other (Cohen 1960)."""
    classes = int(max(predicted.max(), labels.max())) + 1
    p, q = (np.bincount(v, minlength=classes) / len(v) for v in (predicted, labels))
    return float((p * q).sum())


def above_chance(predicted: I64, labels: I64) -> bool:
    """The hits are more than chance explains."""
    hits, expected = int((predicted == labels).sum()), _by_chance(predicted, labels)
    return at_least(hits, len(labels), expected) <= DOUBT


def chance(predicted: I64, labels: I64, where: str = "the calibration images") -> Iterator[Finding]:
    """Args:
        predicted, labels: int64 (N,), of the float model.
        where: the images, in the message.
    """  # fmt: skip
    count, hits, expected = len(labels), int((predicted == labels).sum()), _by_chance(predicted, labels)
    low, high = interval(hits, count)
    p = at_least(hits, count, expected)
    seen = len(np.union1d(predicted, labels))
    possible = max(expected, 1 / seen) ** count <= DOUBT  # else not even all right would show anything
    skill = (high - expected) / (1 - expected) if expected < 1 else 1.0
    if not possible or (p <= DOUBT and skill >= LEAST_SKILL):
        return
    verdict = "no more than chance" if p > DOUBT else "hardly more than chance"
    yield Finding(
        "chance",
        f"The float model names the label of {hits} of {count} of {where} ({hits / count:.1%}; 95 % interval {low:.1%} to "
        f"{high:.1%}): {verdict} ({expected:.1%} for answers that ignore the image). Check --weights, --preprocess, the "
        "channel order and the numbering of the labels.",
        {"accuracy": hits / count, "accuracy_low": low, "accuracy_high": high, "by_chance": expected, "images": float(count)},
    )


def information(logits: F32) -> float:
    """Mutual information between image and answer, nats: entropy of the mean answer less the mean entropy of the answers."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    p = np.exp(shifted)
    p /= p.sum(1, keepdims=True)
    mean = p.mean(0)
    return float(-(mean * np.log(mean + 1e-30)).sum() + (p * np.log(p + 1e-30)).sum(1).mean())


def one_answer(logits: F32, mismatch: float | None) -> Iterator[Finding]:
    """Unlabelled images that a model does not tell apart.

    Args:
        logits: float32 (N, classes).
        mismatch: of the norms' statistics (`export.diagnose.reading`); None where no norm has any.
    """
    count, classes = logits.shape
    said = information(logits) / np.log(classes)
    if count < FEWEST or said >= LEAST_INFORMATION:
        return
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    confidence = float((1 / shifted.sum(1)).mean())
    if mismatch is not None and mismatch < NEAR and confidence > TOLD:
        return
    often = int(np.bincount(logits.argmax(1)).max())
    yield Finding(
        "one-answer",
        f"The model's answer hardly depends on the image: class {int(np.bincount(logits.argmax(1)).argmax())} for {often} of "
        f"{count} calibration images, with a mean confidence of {confidence:.0%} ({said:.1%} of what {classes} classes can "
        "say). Check --weights and --preprocess; labelled images would tell more (--validation).",
        {"information": float(said), "confidence": confidence, "most_frequent": often / count, "images": float(count)},
    )
