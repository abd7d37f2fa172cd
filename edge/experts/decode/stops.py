"""Texts that end a text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Stops"]


class Stops:
    """Cuts a growing text at the first stop text; holds back what may be the beginning of one.

    Attributes:
        found: a stop text came; nothing is shown any more.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.found = stops, "", False

    def add(self, text: str) -> str:
        """What may be shown. After `found` nothing more is."""
        if self.found:
            return ""
        if not self._stops:
            return text
        self._held += text
        at = min((i for i in (self._held.find(s) for s in self._stops) if i >= 0), default=-1)
        if at >= 0:
            self.found = True
            shown, self._held = self._held[:at], ""
            return shown
        keep = max((n for s in self._stops for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def end(self) -> str:
        shown, self._held = self._held, ""
        return shown
