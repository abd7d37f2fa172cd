"""Numbers of the device's own adaptation, each with its unit and its reason (measured in docs/guide/adaptation.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from refold.errors import UsageError

__all__ = ["AdaptSettings", "CorrectionName"]

CorrectionName = Literal["off", "auto", "lame", "t3a", "adanpc"]


@dataclass(frozen=True)
class AdaptSettings:
    """Settings of `edge.adapt.Adapter`.

    Attributes:
        enabled: False serves releases only: no taps, no overlay, no domains.
        mix: share of the observed statistics once there is much evidence, 0..1. Half is better than all: the norms were
            trained on the reference statistics, and the wanted signal is part of what plain batch statistics remove.
        prior_frames: evidence, in tapped frames, at which half of `mix` is reached.
        release_trust: what a frame of a release's own statistics counts against a tapped frame of the device, where the release
            was made for the very domain; 0 serves the release's affine parameters on the device's statistics alone.
        staleness: weight kept by older evidence each time the served state changes, 0..1: deeper sites saw other inputs then.
        evidence_frames: tapped frames remembered; older ones fade, so that slow drift is followed.
        first_rebuild: tapped frames before the first overlay of a domain; each later one waits for twice the evidence.
        rebuild_step: most tapped frames between two overlays during the burst. A site's evidence is only as good as the
            statistics of the sites before it, so that the truth travels down the network one overlay at a time.
        settle_from: tapped frames of a new domain before they are looked at again behind the overlay made of them; once more at
            twice as many, and so on up to `burst`. So many pictures are kept in memory meanwhile.
        settle_passes: most times they are looked at in a row; fewer when their statistics stay. 0 never looks again.
        burst: tapped frames in a row after a shift; half as many after a release for the present domain.
        thinning: tapped frames at each of the intervals 2, 4, 8, ... on the way from the burst to `interval`.
        interval: one frame in this many is tapped in a domain that is known well.
        watch_every: features are computed for one frame in this many while nothing happens; they cost more than all else here.
        shift_threshold: squared distance per feature, in units of its own sampling variance, that counts as a shift.
        shift_floor: squared distance per feature, in units of the variance between single frames, below which a shift is too
            small to matter.
        probe_frames: frames after an alarm whose mean decides between a known domain and a new one.
        review_frames: frames after which a domain is compared once more, now precisely, with the others and joined to its like.
        domains: largest number of domains kept; the one seen longest ago goes first.
        report_frames: tapped frames per statistics report.
        correction: what corrects answers where the classes predicted come in runs; off without `enabled`, whose shift detector
            tells a run from a shift. auto: the one that measured best.
        second_look: an unsure answer is averaged with the one for the mirrored image, at 1.2 times the mean compute at most.
        novelty: frames that no domain explains are marked, and offered for upload first.
    """

    enabled: bool = True
    mix: float = 0.45
    prior_frames: float = 12.0
    release_trust: float = 8.0
    staleness: float = 0.9
    evidence_frames: float = 512.0
    first_rebuild: int = 2
    rebuild_step: int = 8
    settle_from: int = 16
    settle_passes: int = 6
    burst: int = 64
    thinning: int = 12
    interval: int = 64
    watch_every: int = 3
    shift_threshold: float = 6.0
    shift_floor: float = 0.025
    probe_frames: int = 24
    review_frames: int = 256
    domains: int = 16
    report_frames: int = 32
    correction: CorrectionName = "off"
    second_look: bool = False
    novelty: bool = False

    def __post_init__(self) -> None:
        if self.correction not in get_args(CorrectionName):
            raise UsageError(f"adapt.correction is {self.correction!r}; it is one of: {', '.join(get_args(CorrectionName))}.")
        if self.correction != "off" and not self.enabled:
            raise UsageError(
                f"adapt.correction is {self.correction!r} and adapt.enabled is false: without the shift detector a shift that "
                "moves answers to one class would be taken for a run of it. Set the first to off or the second to true."
            )
        for name in ("mix", "staleness"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(f"adapt.{name} is {getattr(self, name)}; it is a share between 0 and 1.")
        for name in (
            "first_rebuild",
            "settle_from",
            "burst",
            "interval",
            "watch_every",
            "probe_frames",
            "review_frames",
            "domains",
            "report_frames",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"adapt.{name} is {getattr(self, name)}; it counts frames or domains and is at least 1.")
        for name in ("prior_frames", "evidence_frames", "shift_threshold"):
            if not getattr(self, name) > 0:
                raise UsageError(f"adapt.{name} is {getattr(self, name)}; it must be above 0.")
        if self.settle_passes < 0:
            raise UsageError("adapt.settle_passes is below 0; it counts passes, and 0 switches them off.")
        if self.release_trust < 0:
            raise UsageError("adapt.release_trust is below 0; it weighs a release's statistics.")
        if self.domains < 2:
            raise UsageError("adapt.domains is 1; at least 2 are kept: the exported one and the present one.")
