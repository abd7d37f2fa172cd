"""A piece of work that is done again and again for as long as the service runs, whatever becomes of one time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor

from cloud.telemetry import UPKEEP_FAILURES
from refold.errors import RefoldError

__all__ = ["Round"]

log = logging.getLogger(__name__)


class Round:
    """Blocking work on a thread, every `every_s` seconds, beginning at once.

    A failure of any kind is logged, counted and remembered until the work succeeds again; the next time comes all the same.

    Args:
        name: for people, as the subject of a sentence.
    """

    def __init__(self, name: str, work: Callable[[], object], every_s: float) -> None:
        self.name, self._work, self._every = name, work, every_s
        self._since = 0.0
        self._fault = ""

    @property
    def warning(self) -> str:
        """One sentence for an operator while the latest time failed, else ""."""
        if not self._fault:
            return ""
        return f"{self.name} has failed since {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(self._since))} UTC: {self._fault}"

    async def keep(self, pool: Executor) -> None:
        """Goes on until it is cancelled."""
        while True:
            await asyncio.get_running_loop().run_in_executor(pool, self.once)
            await asyncio.sleep(self._every)

    def once(self) -> None:
        """Does the work; never raises."""
        try:
            self._work()
        except RefoldError as e:
            self._failed(e.message)
            log.warning("%s failed: %s", self.name, e.message, extra={"code": e.code, "detail": e.detail})
        except Exception as e:
            self._failed(f"{type(e).__name__}; the log has the details.")
            log.exception("%s failed", self.name)
        else:
            self._fault = ""

    def _failed(self, fault: str) -> None:
        UPKEEP_FAILURES.add(1, work=self.name)
        if not self._fault:
            self._since = time.time()
        self._fault = fault
