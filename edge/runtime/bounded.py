"""A task that may hang in a disk, for a caller that may not."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["bounded"]


def bounded(name: str, task: Callable[[], object], seconds: float) -> bool:
    """Runs a task on a thread of its own and waits for it, `seconds` at most. Whatever it raises in that time is raised here.

    Returns:
        False: it has not ended; it goes on, and what comes of it is not told. It does not keep the process alive.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            task()
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return False
    if failed:
        raise failed[0]
    return True
