"""Forward-only adaptation on the device: shift features, shift detector, kept images, their statistics, domain bank."""

from __future__ import annotations

from edge.adapt.adapter import Adapter
from edge.adapt.bank import HOME, Domain, DomainBank
from edge.adapt.evidence import Evidence
from edge.adapt.features import FEATURES, FrameFeatures, Reference
from edge.adapt.kept import KeptImages
from edge.adapt.observer import ImageObserver
from edge.adapt.proposal import Proposal
from edge.adapt.schedule import KeepSchedule
from edge.adapt.settings import AdaptSettings
from edge.adapt.shift import ShiftDetector

__all__ = [
    "FEATURES",
    "HOME",
    "AdaptSettings",
    "Adapter",
    "Domain",
    "DomainBank",
    "Evidence",
    "FrameFeatures",
    "ImageObserver",
    "KeepSchedule",
    "KeptImages",
    "Proposal",
    "Reference",
    "ShiftDetector",
]
