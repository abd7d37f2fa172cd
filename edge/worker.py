"""A background thread with a short queue: whatever may wait for a disk, a network or a build, so that no frame does."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from refold.errors import RefoldError

__all__ = ["Inline", "Runner", "Waiting", "Worker"]

log = logging.getLogger(__name__)
Task = Callable[[], None]


class Runner:
    """Where the frame path hands work to. `batch`: tasks of one kind worth collecting before a thread is woken."""

    batch = 1

    def __init__(self) -> None:
        self._failing: dict[Task, str] = {}
        self._since: float | None = None

    @property
    def waiting_s(self) -> float:
        """Seconds since the task that runs now was begun; 0 when none runs. Any thread."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def last_error(self) -> str:
        """Sentence of the latest kind of task that failed when it was last run; empty when none did."""
        return next(reversed(list(self._failing.values())), "")

    def offer(self, task: Task) -> bool:
        """False when there is no room: the task is dropped and counted by whoever offered it."""
        raise NotImplementedError

    def close(self, timeout: float = 10.0) -> None:
        """Does what is queued, then stops."""

    def _run(self, task: Task) -> None:
        self._since = time.monotonic()
        try:
            task()
        except RefoldError as e:
            self._tell(task, e.message)
        except Exception as e:
            self._fault(task, e)
        else:
            if self._failing:
                self._failing.pop(task, None)
        finally:
            self._since = None

    def _fault(self, task: Task, e: Exception) -> None:
        """Something nobody foresaw: with its traceback in the log, and the device goes on."""
        self._tell(task, f"{type(e).__name__}: {e}", e)

    def _tell(self, task: Task, sentence: str, fault: Exception | None = None) -> None:
        if sentence not in self._failing.values():  # a full disk is said once, not at every frame and not by every task
            log.warning("%s", sentence, exc_info=fault)
        self._failing[task] = sentence


class Inline(Runner):
    """Does everything at once on the caller's thread: deterministic, for benchmarks and tests."""

    def offer(self, task: Task) -> bool:
        self._run(task)
        return True

    def _fault(self, task: Task, e: Exception) -> None:
        raise e  # a fault of ours would only make a benchmark wrong in silence


class Waiting(Inline):
    """Does everything at once, and the caller waits for it; a fault is said, and the caller goes on: for replayed files."""

    def _fault(self, task: Task, e: Exception) -> None:
        Runner._fault(self, task, e)


@dataclass
class _Periodic:
    due: float
    seconds: float
    task: Task


class Worker(Runner):
    """Runs tasks one by one on a thread of lower priority.

    Args:
        depth: tasks that may wait.
        niceness: added to the thread's own; the frame loop's core is not the worker's to take.
    """

    batch = 4

    def __init__(self, name: str, depth: int, *, niceness: int = 5) -> None:
        super().__init__()
        self.depth = depth
        self._niceness = niceness
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._periodic: list[_Periodic] = []
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    def every(self, seconds: float, task: Task, *, at_once: bool = False) -> None:
        """Also runs `task` about every `seconds`, the first time after that, or `at_once`. Call before `start`."""
        self._periodic.append(_Periodic(time.monotonic() + (0.0 if at_once else seconds), seconds, task))

    def start(self) -> None:
        self._thread.start()

    def offer(self, task: Task) -> bool:
        if self._closing or self._tasks.qsize() >= self.depth:
            return False
        self._tasks.put(task)
        return True

    def _loop(self) -> None:
        if hasattr(os, "PRIO_PROCESS"):
            try:  # on Linux a thread has a priority of its own
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)
            except OSError:
                pass
        while True:
            try:
                task = self._tasks.get(timeout=self._until_next())
            except Empty:
                self._due()
                continue
            if task is None:
                return
            self._run(task)
            self._due()

    def _until_next(self) -> float | None:
        if not self._periodic:
            return None
        return max(0.0, min(p.due for p in self._periodic) - time.monotonic())

    def _due(self) -> None:
        for entry in self._periodic:
            if time.monotonic() >= entry.due:
                self._run(entry.task)
                entry.due = time.monotonic() + entry.seconds

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def close(self, timeout: float = 10.0) -> None:
        self._closing = True
        if self._thread.is_alive():
            self._tasks.put(None)
            self._thread.join(timeout)
