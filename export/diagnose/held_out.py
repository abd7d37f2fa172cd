"""Accuracy and agreement on labelled images that neither the training nor the calibration saw (`--validation`).

A model knows its training images by heart: measured on those, 100 % says nothing. Numbers in a target's checks:

validation_images       how many were used
validation_argmax_float share on which the engine chooses the float model's class
validation_accuracy_float, validation_accuracy_int8   share of right answers; where they have labels
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.diagnose.chance import chance
from export.diagnose.finding import Finding
from export.diagnose.intervals import interval
from export.diagnose.labels import checked, numbering
from export.diagnose.reading import respond
from export.ir import Graph
from export.pictures import Pictures
from refold.errors import GateError, InputError
from refold.preprocess import Preprocess

__all__ = ["HeldOut", "measured_accuracy", "told_accuracy"]

F32 = NDArray[np.float32]
FLOAT_ERROR = 0.25  # as in `export.checks`: below it, differing answers are near-ties of an undecided model
TOGETHER = 256  # images preprocessed at a time
CALIBRATION = "the calibration images, which may be training images"


class HeldOut:
    """Validation images, less those that are calibration images as well, and the float model's answers to them.

    Attributes:
        findings: what is doubtful about them.
    """

    def __init__(self, graph: Graph, given: Pictures, calibration: Pictures, preprocess: Preprocess, classes: int) -> None:
        """Args:
            graph: the float graph after its rules.

        Raises:
            InputError: every validation image is a calibration image, or a label is no class of the model.
        """  # fmt: skip
        found, doubts = checked(given, classes, "validation")
        known = {image.tobytes() for image in calibration.images}
        fresh = np.array([image.tobytes() not in known for image in found.images])
        findings = list(doubts)
        if not fresh.any():
            raise InputError(
                f"All {len(fresh)} validation images are calibration images: give images the model has not seen.",
                code="validation-overlap",
            )
        if not fresh.all():
            findings.append(
                Finding(
                    "validation-overlap",
                    f"{int((~fresh).sum())} of {len(fresh)} validation images are calibration images as well; "
                    "they were left out.",
                    {"images": float(len(fresh)), "left_out": float((~fresh).sum())},
                )
            )
        self.images, self._preprocess = found.images[fresh], preprocess
        self.labels = None if found.labels is None else found.labels[fresh]
        self.float_logits = self.run(lambda x: respond(graph, x).logits)
        predicted = np.asarray(self.float_logits.argmax(1), np.int64)
        if self.labels is None:
            findings.append(Finding("validation-unlabelled", "The validation images have no labels: no accuracy was measured."))
        else:
            where = "the validation images"
            findings += [*numbering(predicted, self.labels, classes)] or [*chance(predicted, self.labels, where)]
        self.findings = tuple(findings)

    def run(self, engine: Callable[[F32], F32]) -> F32:
        """Logits of all images, float32 (N, classes); few are held as model input at a time."""
        parts = [self.images[i : i + TOGETHER] for i in range(0, len(self.images), TOGETHER)]
        return np.concatenate([engine(self._preprocess.apply(part)) for part in parts])

    def measure(self, target: str, engine: Callable[[F32], F32], min_agreement: float) -> tuple[dict[str, float], F32]:
        """Numbers for `Target.checks`, and the engine's logits they were counted from.

        Raises:
            GateError: as on the calibration images, the engine disagrees with the float model too often.
        """
        logits, truth = self.run(engine), self.float_logits
        same = float((logits.argmax(1) == truth.argmax(1)).mean())
        error = float(np.sqrt(np.mean((logits - truth) ** 2)) / max(float((truth - truth.mean(0)).std()), 1e-12))
        if same < min_agreement and error > FLOAT_ERROR:
            raise GateError(
                f"{target}: the integer engine chooses the float model's class on only {same:.1%} of the {len(truth)} "
                f"validation images (error {error:.2f} of the logits' spread). Calibrate with more images like these, try "
                "--correct-bias and --equalise, or lower --min-agreement.",
                code="accuracy",
            )
        numbers = {"validation_images": float(len(truth)), "validation_argmax_float": same}
        if self.labels is not None:
            numbers["validation_accuracy_float"] = float((truth.argmax(1) == self.labels).mean())
            numbers["validation_accuracy_int8"] = float((logits.argmax(1) == self.labels).mean())
        return numbers, logits


def measured_accuracy(checks: Mapping[str, float], calibration: int) -> dict[str, Any] | None:
    """A target's accuracy as plain values that say what it was measured on; None where nothing was labelled.

    Args:
        checks: a target's numbers.
        calibration: how many calibration images there were.
    """
    for prefix, where, count in (
        ("validation_", "validation", int(checks.get("validation_images", 0))),
        ("", CALIBRATION, calibration),
    ):
        if f"{prefix}accuracy_int8" in checks:
            share = checks[f"{prefix}accuracy_int8"]
            return {
                "measured_on": where,
                "images": count,
                "int8": share,
                "int8_interval": list(interval(round(share * count), count)),
                "float": checks[f"{prefix}accuracy_float"],
            }
    return None


def told_accuracy(checks: Mapping[str, float], calibration: int) -> str:
    """The same, and the agreement on validation images, as one sentence."""
    found, agreement = measured_accuracy(checks, calibration), ""
    if "validation_images" in checks:
        count, same = int(checks["validation_images"]), checks["validation_argmax_float"]
        low, high = interval(round(same * count), count)
        agreement = f"; on {count:,} validation images the float model's class on {same:.1%} ({low:.1%} to {high:.1%})"
    if found is None:
        return f"accuracy not measured: no labelled images, no --validation{agreement}" if not agreement else (
            f"accuracy not measured: the validation images have no labels{agreement}"
        )  # fmt: skip
    low, high = found["int8_interval"]
    told = f"accuracy {found['int8']:.1%} ({low:.1%} to {high:.1%}) in integers, {found['float']:.1%} in float,"
    told += f" measured on {found['images']:,} validation images" if found["measured_on"] == "validation" else (
        f" measured on {CALIBRATION}: give --validation for an accuracy on unseen ones"
    )  # fmt: skip
    return told + agreement
