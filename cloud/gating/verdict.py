"""What is known of a candidate, weighed: pass, refuse, or wait. Pure; the numbers come from `cloud.gate`."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cloud.gating.comparison import Comparison, Scores, histogram_entropy, paired
from cloud.settings import GateSettings

__all__ = ["Finding", "GateResult", "clean_fault", "missing_evidence", "spread_of", "verdict"]

FAINT = 0.05  # standard errors: a fall of the cross-entropy below this is none at all
QUARTER = 0.25  # standard errors: a rise of the cross-entropy below this is not called one
NOTHING = 1e-9  # nats: two engines that answer alike differ by no more


class Finding(enum.Enum):
    """What the evidence is enough for."""

    PASS = "passed"
    REFUSE = "refused"
    WAIT = "undecided"


@dataclass(frozen=True)
class GateResult:
    """`reasons`: what was wrong or is missing, or the one line that says why it passed."""

    finding: Finding
    reasons: tuple[str, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.finding is Finding.PASS

    @property
    def undecided(self) -> bool:
        return self.finding is Finding.WAIT

    @classmethod
    def refused(cls, *reasons: str, metrics: Mapping[str, float] | None = None) -> GateResult:
        return cls(Finding.REFUSE, reasons, metrics or {})


def verdict(new: Scores, old: Scores, teacher_spread: float, settings: GateSettings) -> GateResult:
    """Judges a candidate's scores against those of what is served now, on the same held-out images.

    Pass: one of the two is better by more than `standard_errors` and the other not worse, or one is better at all, the other
    not worse, and a loss of `tolerated_points` is ruled out.
    Refuse: either statistic is worse by more than `harm_errors`, or answers collapse to few classes. Anything else is
    undecided: more held-out images will tell.
    """
    z = settings.standard_errors
    rise = paired(new.expected, old.expected, old.confidence)
    gain = paired(-new.cross_entropy, -old.cross_entropy, NOTHING)
    metrics = _metrics(new, old, rise, gain, settings)
    said = (
        f"agreement {100 * old.agreement:.1f} % to {100 * new.agreement:.1f} % on {rise.images} held out "
        f"(expected {100 * rise.rise:+.1f} points; {100 * rise.smallest_effect(z):.1f} could be shown)"
    )
    if new.class_entropy < settings.entropy_share * teacher_spread and new.class_entropy < old.class_entropy:
        collapse = (
            f"predictions collapse to few classes: entropy {new.class_entropy:.2f} where the teacher's is {teacher_spread:.2f}"
        )
        return GateResult.refused(collapse, metrics=metrics)
    if min(gain.standard_errors, rise.standard_errors) <= -settings.harm_errors:
        return GateResult.refused(f"it agrees less with the teacher: {said}", metrics=metrics)
    if 100 * (new.agreement - old.agreement) < settings.agreement_points and settings.agreement_points > 0:
        return GateResult.refused(
            f"agreement rises by less than the {settings.agreement_points:g} points asked for: {said}", metrics=metrics
        )
    falls, rises = gain.standard_errors, rise.standard_errors
    no_loss = 100 * (rise.rise - rise.smallest_effect(z)) > -settings.tolerated_points
    not_worse = falls > -QUARTER
    helps = falls >= z or (rises >= z and not_worse) or (no_loss and (falls > FAINT or (rise.rise > 0 and not_worse)))
    if helps and rise.images >= settings.held_back:
        return GateResult(Finding.PASS, (said,), metrics)
    wanted = max(rise.images_for(settings.tolerated_points / 100, z), settings.held_back)
    return GateResult(
        Finding.WAIT,
        (f"undecided: {said}; {_wanted(wanted, rise.images, settings)}",),
        metrics,
    )


def _wanted(wanted: int, images: int, settings: GateSettings) -> str:
    if wanted > images:
        return f"about {wanted} held-out samples would rule out a loss of {settings.tolerated_points:g} points"
    return f"a loss of {settings.tolerated_points:g} points is ruled out, but nothing shows a gain"


def missing_evidence(count: int, teacher: object, shown: int, settings: GateSettings) -> GateResult | None:
    """What is missing before anything can be judged; None when nothing is.

    Args:
        count: held-out images that could be read; shown: how many of them a teacher answered; teacher: None without one.
    """
    if teacher is None and count:
        return GateResult.refused("there is no teacher: nothing shows that this release helps")
    if count < settings.held_back or shown < count:
        return GateResult(
            Finding.WAIT,
            (f"undecided: {min(count, shown)} held-out samples could be read, {settings.held_back} are the fewest",),
            {"held_back": float(count)},
        )
    return None


def clean_fault(new: np.ndarray, old: np.ndarray, allowed: float, what: str, *, strict: bool) -> str:
    """A sentence when clean images are lost beyond `allowed` points; "" when not.

    Args:
        new, old: bool (N,), right answers of the candidate and of what is served now, N at least 1.
        strict: chance is no excuse; otherwise the fall must also be more than its standard error.
    """
    change = paired(new.astype(np.float64), old.astype(np.float64))
    fall = -100 * change.rise
    if fall <= allowed or (not strict and fall <= 100 * change.error):
        return ""
    return (
        f"{what} falls by {fall:.1f} points to {100 * float(new.mean()):.1f} % "
        f"({round(allowed, 1):g} are allowed; {100 * change.error:.1f} are chance)"
    )


def _metrics(new: Scores, old: Scores, rise: Comparison, gain: Comparison, settings: GateSettings) -> dict[str, float]:
    z = settings.standard_errors
    return {
        "held_back": float(rise.images),
        "agreement": new.agreement,
        "agreement_before": old.agreement,
        "expected_rise": rise.rise,
        "smallest_effect": rise.smallest_effect(z),
        "held_back_wanted": float(rise.images_for(settings.tolerated_points / 100, z)),
        "cross_entropy": float(new.cross_entropy.mean()),
        "cross_entropy_before": float(old.cross_entropy.mean()),
        "cross_entropy_errors": gain.standard_errors,
        "class_entropy": new.class_entropy,
    }


def spread_of(teacher: np.ndarray) -> float:
    """Entropy in nats of the teacher's answers, probabilities (N, classes)."""
    return histogram_entropy(teacher.argmax(1), teacher.shape[1])
