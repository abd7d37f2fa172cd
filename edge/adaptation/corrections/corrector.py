"""One stream's correction behind its switch; and the same for requests, which come on several threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np

from edge.adaptation.corrections.adanpc import AdaNPC
from edge.adaptation.corrections.correction import F32, Correction
from edge.adaptation.corrections.evidence import RunEvidence
from edge.adaptation.corrections.lame import Lame
from edge.adaptation.corrections.t3a import T3A
from edge.softmax import softmax
from refold.errors import UsageError

__all__ = ["AUTO", "CORRECTIONS", "Corrector", "RequestCorrector", "as_logits", "make_corrector"]

CORRECTIONS: dict[str, Callable[[int, F32 | None], Correction]] = {  # of the number of classes and the calibration logits
    "lame": lambda classes, known: Lame(classes),
    "t3a": lambda classes, known: T3A(classes),
    "adanpc": lambda classes, known: AdaNPC(classes, known=known),
}
AUTO = "lame"  # the only one that harmed no stream of gaussian noise, brightness and clean images, seed 100


class Corrector:
    """Watches one stream and corrects its answers while the evidence supports it. Not thread-safe.

    Args:
        correction: sees every frame, so that it is ready when it is switched on.
        evidence: sees the engine's own predictions, never the corrected ones.
    """

    def __init__(self, correction: Correction, evidence: RunEvidence) -> None:
        self.correction, self.evidence = correction, evidence
        self.frames = self.corrected = 0
        self._domain = ""

    @property
    def calibrated(self) -> bool:
        """Whether upload rules may be given the corrected probabilities."""
        return self.correction.calibrated

    @property
    def memory_bytes(self) -> int:
        return self.correction.memory_bytes + self.evidence.memory_bytes

    def answer(self, logits: F32, domain: str) -> F32 | None:
        """Takes the next frame's logits, float32 (C,); its corrected probabilities, or None: as the engine said.

        Logits that are not finite are not remembered. With another domain than at the frame before, everything begins anew.
        """
        if domain != self._domain:
            self._domain = domain
            self.evidence.forget()
            self.correction.forget()
        self.frames += 1
        probabilities, predicted, entropy = softmax(logits)
        if not math.isfinite(entropy):
            return None
        supported = self.evidence.saw(predicted)
        self.correction.observe(logits, probabilities)
        if not supported:
            return None
        corrected = self.correction.corrected()
        if not math.isfinite(float(corrected.sum())):
            return None
        self.corrected += 1
        return corrected

    def metrics(self) -> dict[str, float]:
        """Counters and gauges; any thread."""
        return {
            "correction_on": float(self.evidence.on),
            "correction_switches": float(self.evidence.switches),
            "corrected_frames": float(self.corrected),
            "class_runs": self.evidence.share,
        }


class RequestCorrector:
    """Requests are a stream of their own: an application's images and a camera's are no neighbours. Thread-safe."""

    def __init__(self, corrector: Corrector, domain: Callable[[], str]) -> None:
        self.corrector = corrector
        self._domain = domain
        self._lock = threading.Lock()  # taken by request threads only: the frame loop has a corrector without one

    def answer(self, logits: F32) -> list[F32 | None]:
        """Takes a request's logits, float32 (N, C), in order; for each image what `Corrector.answer` says."""
        domain = self._domain()
        with self._lock:
            return [self.corrector.answer(row, domain) for row in logits]


def make_corrector(name: str, class_count: int, known: F32 | None = None) -> Corrector | None:
    """The corrector of `[adapt] correction`; None for "off".

    Args:
        known: the exported engine's logits of the calibration images, float32 (N, C), which AdaNPC's memory begins with.

    Raises:
        UsageError: no such correction, or a model without at least two classes.
    """
    if name == "off":
        return None
    make = CORRECTIONS.get(AUTO if name == "auto" else name)
    if make is None:
        raise UsageError(f"There is no correction {name!r}; choose one of: off, auto, {', '.join(CORRECTIONS)}.")
    if class_count < 2:
        raise UsageError(
            f"adapt.correction is {name!r}, and this model has {class_count} classes; corrections need at least two. "
            "Set it to off."
        )
    return Corrector(make(class_count, known), RunEvidence(class_count))


def as_logits(probabilities: F32) -> F32:
    """ln p, float32 (C,): logits whose softmax is `probabilities`."""
    out: F32 = np.log(np.maximum(probabilities, np.float32(1e-30)))
    return out
