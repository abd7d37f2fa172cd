"""What the operator of the demo's cloud sees, asked on a thread of its own so that a cloud that is away delays nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from refold.errors import RefoldError
from refold.v1 import admin_pb2 as pb

__all__ = ["AdminPoller"]

EVERY = 0.7  # seconds between two questions


class AdminPoller:
    """Context manager that keeps the latest answers. `ask` gives (status, releases) or raises RefoldError."""

    def __init__(self, ask: Callable[[], tuple[pb.StatusResponse, pb.ListReleasesResponse]]) -> None:
        self._ask = ask
        self._status: pb.StatusResponse | None = None
        self._releases: pb.ListReleasesResponse | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="admin", daemon=True)

    def __enter__(self) -> AdminPoller:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(20.0)

    def _loop(self) -> None:
        while not self._stop.is_set():
            self.refresh()
            self._stop.wait(EVERY)

    def refresh(self) -> bool:
        """Asks now; False when the cloud does not answer."""
        try:
            self._status, self._releases = self._ask()
        except RefoldError:
            return False
        return True

    def status(self) -> pb.StatusResponse | None:
        return self._status

    def releases(self) -> pb.ListReleasesResponse | None:
        return self._releases
