"""Where polls wait: one event per (bundle, cohort), set from any thread when its pointer moves."""

from __future__ import annotations

import asyncio
from collections import defaultdict

__all__ = ["Board"]


class Board:
    """Lives on one event loop; `notify` may be called from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: defaultdict[tuple[str, str], set[asyncio.Event]] = defaultdict(set)
        self._closed = False

    def notify(self, bundle_digest: str, cohort: str) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, (bundle_digest, cohort))

    def _wake(self, key: tuple[str, str]) -> None:
        for event in self._waiting.pop(key, ()):
            event.set()

    def close(self) -> None:
        """Ends every wait, now and later: the server is stopping. On the loop's thread only."""
        self._closed = True
        for key in list(self._waiting):
            self._wake(key)

    def ticket(self, bundle_digest: str, cohort: str) -> asyncio.Event:
        """An event for the next move. Take it before looking, so that no move falls between looking and waiting."""
        event = asyncio.Event()
        if self._closed:
            event.set()
        self._waiting[bundle_digest, cohort].add(event)
        return event

    async def wait(self, key: tuple[str, str], event: asyncio.Event, seconds: float) -> bool:
        """True when the pointer moved, False when the time is over; the ticket is given back either way."""
        try:
            await asyncio.wait_for(event.wait(), seconds)
            return True
        except asyncio.TimeoutError:
            return False
        finally:
            self.give_back(key, event)

    def give_back(self, key: tuple[str, str], event: asyncio.Event) -> None:
        waiting = self._waiting.get(key)
        if waiting is not None:
            waiting.discard(event)
            if not waiting:
                del self._waiting[key]

    @property
    def closed(self) -> bool:
        return self._closed

    def __len__(self) -> int:
        return sum(len(w) for w in self._waiting.values())
