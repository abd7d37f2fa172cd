"""What an adapter counts since it was made."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Counters"]


@dataclass
class Counters:
    """Attributes:
    shifts, recalls: alarms, and known domains recalled.
    images_kept, images_blind: offered for keeping; showing nothing.
    measured, skipped: sets of images; `skipped`: too much alike.
    overlays_refused, overlays_unsupported: states left out as not admissible; for want of support.
    """

    shifts: int = 0
    recalls: int = 0
    images_kept: int = 0
    images_blind: int = 0
    measured: int = 0
    skipped: int = 0
    overlays_refused: int = 0
    overlays_unsupported: int = 0

    def metrics(self) -> dict[str, float]:
        """For a heartbeat, by name."""
        return {name: float(value) for name, value in asdict(self).items()}
