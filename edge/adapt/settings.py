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
        enabled: False serves releases only: nothing is measured, and there are no domains.
        mix: how far a shift of the norms' statistics is followed, 0..1; `refold.statistics` tells a shift from another mix of
            classes and from chance.
        release_trust: what an image of a release's own statistics counts against one of the device's, where the release was
            made for the very domain; 0 serves the release's affine parameters on the device's statistics alone.
        evidence_frames: images remembered; older ones fade, so that slow drift is followed.
        images: images of the present domain kept in memory, and measured together.
        first_images: kept images of a new domain that are measured first.
        memory_mb: MiB that kept images and a run of the statistics graph may take; large images are fewer or go in chunks.
        burst: frames kept in a row after a shift.
        thinning: frames kept at each of the intervals 2, 4, 8, ... on the way from the burst to `interval`.
        interval: one frame in this many is kept in a domain that is known well.
        watch_every: features are computed for one frame in this many while nothing happens; they cost more than all else here.
        shift_threshold: squared distance per feature, in units of its own sampling variance, that counts as a shift.
        shift_floor: squared distance per feature, in units of the variance between single frames, below which a shift is too
            small to matter.
        probe_frames: frames after an alarm whose mean decides between a known domain and a new one.
        review_frames: frames after which a domain is compared once more, now precisely, with the others and joined to its like.
        domains: largest number of domains remembered; the one seen longest ago goes first.
        correction: what corrects answers where the classes predicted come in runs; off without `enabled`, whose shift detector
            tells a run from a shift. auto: the one that measured best.
        second_look: an unsure answer is averaged with the one for the mirrored image, at 1.2 times the mean compute at most.
        novelty: frames that no domain explains are marked, and offered for upload first.
    """

    enabled: bool = True
    mix: float = 1.0
    release_trust: float = 8.0
    evidence_frames: float = 512.0
    images: int = 64
    first_images: int = 32
    memory_mb: int = 64
    burst: int = 64
    thinning: int = 64
    interval: int = 64
    watch_every: int = 3
    shift_threshold: float = 6.0
    shift_floor: float = 0.025
    probe_frames: int = 24
    review_frames: int = 256
    domains: int = 16
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
        if not 0.0 <= self.mix <= 1.0:
            raise UsageError(f"adapt.mix is {self.mix}; it is a share between 0 and 1.")
        counted = (
            "images",
            "first_images",
            "memory_mb",
            "burst",
            "interval",
            "watch_every",
            "probe_frames",
            "review_frames",
            "domains",
        )
        for name in counted:
            if getattr(self, name) < 1:
                raise UsageError(
                    f"adapt.{name} is {getattr(self, name)}; it counts images, frames, MiB or domains and is at least 1."
                )
        for name in ("evidence_frames", "shift_threshold"):
            if not getattr(self, name) > 0:
                raise UsageError(f"adapt.{name} is {getattr(self, name)}; it must be above 0.")
        if self.release_trust < 0:
            raise UsageError("adapt.release_trust is below 0; it weighs a release's statistics.")
        if self.domains < 2:
            raise UsageError("adapt.domains is 1; at least 2 are kept: the exported one and the present one.")
