"""Threads that compute beside the caller: the kernel lets go of the interpreter's lock, so two experts take the time of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Lock
from typing import TypeVar

import torch

__all__ = ["Crew"]

T = TypeVar("T")


class Crew:
    """The threads of one model. Several models in a process have one each, of different sizes.

    Args:
        threads: that work at a time, the caller's among them; 2 or more.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._helpers = ThreadPoolExecutor(threads - 1, "refold-compute")

    @classmethod
    def of(cls, threads: int) -> Crew | None:
        """None where the caller works alone."""
        return cls(threads) if threads > 1 else None

    def each(self, work: Callable[[T], None], items: Iterable[T]) -> None:
        """`work` on every item, each done once, in no order. Returns when nobody works any more.

        Raises:
            Whatever `work` raised first; items that nobody had begun are left out then.
        """
        todo = list(items)[::-1]
        taking, inference = Lock(), torch.is_inference_mode_enabled()

        def labour() -> None:
            with torch.inference_mode(inference):  # a thread's own setting
                while True:
                    with taking:
                        if not todo:
                            return
                        item = todo.pop()
                    try:
                        work(item)
                    except BaseException:
                        with taking:
                            todo.clear()
                        raise

        helping: list[Future[None]] = []
        with suppress(RuntimeError):  # closed meanwhile: the caller does it alone
            for _ in range(min(self.threads, len(todo)) - 1):
                helping.append(self._helpers.submit(labour))
        failed: BaseException | None = None
        try:
            labour()
        except BaseException as e:
            failed = e
        told = [failed, *(helper.exception() for helper in helping)]  # waits for every one of them
        failed = next((e for e in told if e is not None), None)
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Work under way is finished first; later work is the caller's alone."""
        self._helpers.shutdown()
