"""Forward-only adaptation on the device: shift features, shift detector, tapped evidence, gated overlay, domain bank."""

from __future__ import annotations

from edge.adapt.adapter import Adapter
from edge.adapt.bank import HOME, Domain, DomainBank
from edge.adapt.evidence import Evidence, TapLayout
from edge.adapt.features import FEATURES, FrameFeatures, Reference
from edge.adapt.observer import TapObserver
from edge.adapt.overlay import mixed_states, within_trust
from edge.adapt.proposal import Proposal
from edge.adapt.schedule import TapSchedule
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
    "Proposal",
    "Reference",
    "ShiftDetector",
    "TapLayout",
    "TapObserver",
    "TapSchedule",
    "mixed_states",
    "within_trust",
]
