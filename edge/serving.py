"""What a device serves: which norm states, scales and release its engine is built from. A value; engines are made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from refold.norms import ActivationScale, NormState
from refold.release import Release

__all__ = ["ServingState"]


@dataclass(frozen=True)
class ServingState:
    """One version of the norms, complete enough to build an engine and to say later what a prediction was made with.

    Attributes:
        states: by site name; sites left out are as exported.
        activations: activation scales that differ from the exported ones.
        release_version: the release below; 0 is the state the bundle was exported with.
        domain: the device's domain id.
        overlay: True when the device mixed statistics of its own into the release's.
        release_digest: of the release below; "" is the exported state. An overlay belongs to this release and to no other.
    """

    states: Mapping[str, NormState] = field(default_factory=dict)
    activations: tuple[ActivationScale, ...] = ()
    release_version: int = 0
    domain: str = ""
    overlay: bool = False
    release_digest: str = ""

    @classmethod
    def of(cls, release: Release, domain: str = "") -> ServingState:
        """The state of a release as the cloud made it, without anything of the device's own."""
        return cls(release.states, release.activations, release.version, domain or release.domain)
