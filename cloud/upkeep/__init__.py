"""What the service does for itself at regular intervals."""

from __future__ import annotations

from cloud.upkeep.rounds import Round

__all__ = ["Round"]
