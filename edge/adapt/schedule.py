"""Which frames are kept: all for a short burst after a shift, then ever fewer: evidence grows, cost stays flat."""

from __future__ import annotations

from edge.adapt.settings import AdaptSettings

__all__ = ["KeepSchedule"]


class KeepSchedule:
    """Counts frames of the present domain, and those kept. Intervals are 1 (burst), 2, 4, 8, ... up to the settled one."""

    def __init__(self, settings: AdaptSettings) -> None:
        self._settings = settings
        self.restart()

    def restart(self, known_frames: float = 0.0) -> None:
        """A new domain, or one that is known from so many images already: then most of the burst is spared."""
        self._interval = 1
        self._left = self._settings.burst
        self._wait = 0
        while known_frames >= self._left and self._interval < self._settings.interval:
            known_frames -= self._left
            self._next_interval()

    def settle(self) -> None:
        """Nothing to learn here: straight to the settled interval."""
        self._interval = self._settings.interval
        self._left = 0
        self._wait = self._interval - 1

    def due(self) -> bool:
        """Takes one frame; True when it is to be kept."""
        if self._wait:
            self._wait -= 1
            return False
        if self._interval < self._settings.interval:
            self._left -= 1
            if self._left <= 0:
                self._next_interval()
        self._wait = self._interval - 1
        return True

    def _next_interval(self) -> None:
        self._interval = min(self._interval * 2, self._settings.interval)
        self._left = self._settings.thinning
